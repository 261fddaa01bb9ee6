"""The inference service: vLLM behind gRPC, and the receiving end of the weight push.

Only the modules under `inference_svc.vllm_backend` import torch and vllm; the rest answers the network and can be
imported without them.
"""
