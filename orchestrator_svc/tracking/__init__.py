"""Trackers: TensorBoard, Weights & Biases, MLflow and a log file, fed by a process beside the job.

The process reads what the job writes into its folder anyway (metrics.jsonl, evaluations.jsonl, rollouts/), so that a
tracker that is slow, or fails, never holds training up, and PT, SFT and GRPO are reported alike.
"""
