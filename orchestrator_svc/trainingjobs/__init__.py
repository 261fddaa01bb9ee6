"""TrainingJobs: jobs as resources of a Kubernetes cluster, reconciled with the orchestrator's own.

`crd` makes the definition, with `schema` from the configuration models; `reconciler` follows the resources, and
`status` says how their jobs are.
"""
