"""From a job's configuration to the runner's settings: the one file of the loop that knows the keys."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

from orchestrator_svc.custom_code import load_function
from orchestrator_svc.grpo.configured.advantage import Advantage, advantages, custom
from orchestrator_svc.grpo.configured.difficulty import Difficulty
from orchestrator_svc.grpo.configured.filters import Filter, gibberish, repetition
from orchestrator_svc.grpo.configured.plan import Plan
from orchestrator_svc.grpo.configured.sampling import Sampling, TemperatureSchedule
from orchestrator_svc.grpo.configured.settings import EnvironmentSpec, RulerSpec, Settings
from surogate.config.env import EnvConfig, EvalConfig
from surogate.config.job import GrpoJob
from surogate.config.orch import OrchConfig
from surogate.config.ruler import RulerConfig
from surogate.config.sampling import SamplingConfig
from surogate.config.shaping import AdvantageConfig, BufferConfig, FilterConfig
from surogate.errors import ConfigError, Violation
from surogate.rpc.channel import ClientSecurity

_NEWEST = -1


def read_settings(job: GrpoJob) -> Settings:
    """The settings of a resolved GRPO job.

    Raises:
        ConfigError: An environment variable that it names is not set.
    """
    train, orch = job.train, job.orch
    resume_step = orch.ckpt.resume_step
    session = {
        **train.model_dump(mode="json"),
        "save_total_limit": orch.ckpt.keep_last or train.save_total_limit,
        "max_steps": orch.max_steps or train.max_steps,
    }
    return Settings(
        model=train.model,
        plan=_plan(job),
        environments=_environments(orch),
        train=session,
        timeout=orch.client.timeout,
        ruler=_ruler(orch.ruler) if orch.ruler.enabled else None,
        lora_rank=train.lora_rank if train.lora and job.infer.enable_lora else 0,
        merge_pushes=train.lora and not job.infer.enable_lora,
        resume=resume_step is not None or train.resume_from_checkpoint,
        resume_step=None if resume_step in (None, _NEWEST) else resume_step,
        skip_progress=orch.ckpt.skip_progress,
        skip_buffer=orch.ckpt.skip_buffer,
        keep_interval=orch.ckpt.keep_interval or 0,
        adapter_name=orch.model.lora_adapter or "",
        write_metrics=orch.dump_metrics,
    )


def _plan(job: GrpoJob) -> Plan:
    train, orch = job.train, job.orch
    return Plan(
        max_steps=orch.max_steps or train.max_steps,
        groups_per_step=orch.batch_size // orch.rollouts_per_example,
        rollouts_per_example=orch.rollouts_per_example,
        context=orch.seq_len,
        sampling=_sampling(orch.sampling, orch.seed),
        max_async_level=orch.max_async_level,
        max_off_policy_steps=orch.max_off_policy_steps,
        oversampling_factor=orch.oversampling_factor,
        refill_rounds=orch.refill_rounds,
        advantage=_advantage(orch.advantage),
        needs_signal=orch.advantage.type != "custom",
        drop_extremes=orch.buffer.online_difficulty_filtering,
        ask_rewards=not orch.buffer.skip_verification,
        filters=[_filter(item) for item in orch.filters],
        difficulty=_difficulty(orch.buffer, orch.seed),
        draw_once=orch.buffer.sample_without_replacement,
        ratios=_ratios(orch),
        hash_keys=orch.buffer.hash_keys,
        checkpoint_interval=orch.ckpt.interval or train.save_steps,
        evaluation_interval=orch.eval.interval if orch.eval else 0,
        evaluate_base=orch.eval is not None and orch.eval.eval_base_model,
        evaluate_origin=orch.eval is not None and not orch.eval.skip_eval_on_resume,
        restart_on_evaluation=orch.eval is not None and orch.eval.cancel_inflight_rollouts_on_eval,
        seed=orch.seed,
    )


def _advantage(config: AdvantageConfig) -> Advantage:
    if config.type == "custom":
        assert config.import_path is not None, "the configuration was checked"
        function = load_function(config.import_path, "orch.advantage.import_path")
        return custom(function, config.kwargs, config.import_path)
    return partial(advantages, kind=config.type, length_weighted_mean=config.length_weighted_mean)


def _filter(config: FilterConfig) -> Filter:
    if config.type == "gibberish":
        finds = partial(gibberish, token_id_threshold=config.token_id_threshold, logprob_offset=config.logprob_offset)
        return Filter(config.type, finds, config.enforce)
    return Filter(
        config.type, partial(repetition, window=config.window, prob_threshold=config.prob_threshold), config.enforce
    )


def _difficulty(buffer: BufferConfig, seed: int) -> Difficulty:
    return Difficulty(
        easy_threshold=buffer.easy_threshold,
        hard_threshold=buffer.hard_threshold,
        min_normal=buffer.normal_pool_min_examples,
        recycle_easy=buffer.recycle_easy_fraction,
        recycle_hard=buffer.recycle_hard_fraction,
        easy_fraction=buffer.easy_fraction,
        hard_fraction=buffer.hard_fraction,
        seed=seed if buffer.seed is None else buffer.seed,
    )


def _ratios(orch: OrchConfig) -> dict[str, float] | None:
    shares = orch.buffer.env_ratios
    return None if shares is None else {env.label: share for env, share in zip(orch.env, shares, strict=True)}


def _sampling(sampling: SamplingConfig, seed: int) -> Sampling:
    change = sampling.temp_scheduler
    schedule = (
        TemperatureSchedule(change.start_temperature, change.end_temperature, change.type)
        if change
        else TemperatureSchedule(sampling.temperature, sampling.temperature)
    )
    return Sampling(
        seed=seed if sampling.seed is None else sampling.seed,
        schedule=schedule,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        repetition_penalty=sampling.repetition_penalty,
    )


def _ruler(ruler: RulerConfig) -> RulerSpec:
    request_timeout = ruler.request_timeout or ruler.judge.timeout
    args = {
        "relative": True,
        "base_url": ruler.judge.base_url,
        "api_key_var": ruler.judge.api_key_var,
        "request_timeout": request_timeout,
        "max_retries": ruler.judge.max_retries,
        "max_retries_on_parse_error": ruler.max_retries_on_parse_error,
        "max_concurrent": ruler.max_concurrent_judges,
        "sampling": ruler.sampling,
        "extra_body": ruler.extra_body,
        "cost": ruler.cost.model_dump(),
        **({"model": ruler.judge_model} if ruler.judge_model else {}),
        **({"rubric": ruler.rubric} if ruler.rubric else {}),
    }
    timeout = request_timeout * (ruler.max_retries_on_parse_error + 1)
    return RulerSpec(
        mode=ruler.mode,
        weight=ruler.weight,
        max_concurrent=ruler.max_concurrent_judges,
        swallow=ruler.swallow_exceptions,
        judge=EnvironmentSpec("ruler", "judge", "orch.ruler", timeout=timeout, args=args, train=False),
    )


def _environments(orch: OrchConfig) -> list[EnvironmentSpec]:
    """Environments by key: those to train on, and those to evaluate on where they are not the same."""
    found = {env.label: _spec(env, f"orch.env.{i}") for i, env in enumerate(orch.env)}
    for i, env in enumerate(orch.eval.env if orch.eval else []):
        assert orch.eval is not None
        whole = _like_training(env, orch.env)
        trained = next((other for other in orch.env if other == whole), None)
        if trained is not None:
            found[trained.label] = _evaluated(found[trained.label], orch.eval)
            continue
        key = whole.label if whole.label not in found else f"{whole.label} (eval {i})"
        spec = replace(_spec(whole, f"orch.eval.env.{i}"), key=key, train=False)
        found[key] = _evaluated(spec, orch.eval)
    return list(found.values())


def _like_training(env: EnvConfig, trained: list[EnvConfig]) -> EnvConfig:
    """An environment to evaluate on that says no more than its id is the one of that id that is trained on."""
    bare = not env.args and env.address is None and env.image is None
    same = next((other for other in trained if other.id == env.id), None)
    return same if bare and same is not None and env.name in (None, same.name) else env


def _spec(env: EnvConfig, key: str) -> EnvironmentSpec:
    return EnvironmentSpec(
        key=env.label,
        id=env.id,
        config_key=key,
        timeout=env.timeout,
        max_turns=env.max_turns,
        args=env.args,
        address=env.address,
        image=env.image or "",
        security=service_security(env, key),
    )


def _evaluated(spec: EnvironmentSpec, evaluation: EvalConfig) -> EnvironmentSpec:
    return replace(spec, held_out=max(evaluation.num_examples, 0), rollouts_per_example=evaluation.rollouts_per_example)


def service_security(env: EnvConfig, key: str) -> ClientSecurity:
    """How to call the service of an environment.

    Raises:
        ConfigError: The environment variable that holds its token is not set.
    """
    token = os.environ.get(env.token_env) if env.token_env else None
    if env.token_env and not token:
        message = f"the environment variable {env.token_env} is not set where the orchestrator runs"
        raise ConfigError.of([Violation(f"{key}.token_env", message)])
    if not env.tls:
        return ClientSecurity(token=token)
    # Whom to trust, and who we are, is the orchestrator's own matter; its workers' token is not.
    return replace(ClientSecurity.from_env(), tls=True, token=token, token_file=None)
