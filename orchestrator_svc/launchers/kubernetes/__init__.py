"""The `kubernetes` launcher: a job's workers are Jobs of the cluster, all owned by one ConfigMap of the job.

`api` speaks to the API server, `mirror` follows it, `manifests` makes objects of `templates` and configuration,
`policy` says what they may have, `worker` keeps one worker alive, `pool` those of a job, `troubles` finds out what is
in their way, and `words` says what happens to them.
"""
