"""A GRPO step: its gradient against an unpacked, naive one; order, repeats, and samples that cannot be trained on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from surogate.errors import InternalError, InvalidInputError
from surogate.v1 import trainer_pb2 as trainer
from tests.helpers.models import loss_reference
from tests.helpers.models.engine import KeepingReporter, open_engine, sample
from tests.helpers.models.tiny import make_tiny_model
from tests.helpers.trainer.rank_program import rollouts
from trainer_svc.worker.engine import Engine
from trainer_svc.worker.loss import policy_loss
from trainer_svc.worker.optim.optimizer import Optimizer, StepOutcome

LOSSES: list[dict[str, Any]] = [
    {"type": "ipo"},
    {"type": "aipo"},
    {"type": "aipo", "ratio_type": "sequence", "kl_tau": 0.1},
    {"type": "dppo"},
    {"type": "grpo", "beta": 0.1},
    {"type": "bnpo"},
    {"type": "dr_grpo"},
    {"type": "dapo"},
    {"type": "cispo"},
    {"type": "gspo", "sampler_correction": "none"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(path, std=0.1)
    return path


def samples(count: int = 12, seed: int = 0) -> list[trainer.TrainingSample]:
    """Rollouts of uneven lengths at two temperatures, sampled by something near a uniform distribution."""
    return rollouts(seed, count)


def grpo_engine(model: Path, out: Path, **train: Any) -> tuple[Engine, KeepingReporter]:
    keys = {"model": str(model), "sequence_len": 64, "max_steps": 10, "lora_rank": 4, "learning_rate": 1e-3}
    return open_engine("grpo", out, {**keys, **train})


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in engine.session.policy.trainable().items()}


def shake_adapter(engine: Engine) -> None:
    """Makes the adapter differ from zero, so that the reference policy is another one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in engine.session.policy.trainable().items():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=generator)


def naive_loss(engine: Engine, loss: Any, batch: list[trainer.TrainingSample]) -> torch.Tensor:
    """One sample after the other through the plain forward of transformers, then the loss over all of them at once."""
    policy = engine.session.policy

    def completion_logprobs(item: trainer.TrainingSample) -> torch.Tensor:
        ids = torch.tensor([item.token_ids])
        logits = policy.model(input_ids=ids, use_cache=False).logits[0, :-1] / item.temperature
        picked = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return picked[torch.tensor(item.loss_mask)[1:]]

    ours = [completion_logprobs(item) for item in batch]
    reference = None
    if policy.adapter is not None:
        with torch.no_grad(), policy.without_adapter():
            reference = torch.cat([completion_logprobs(item) for item in batch])
    sampled = [torch.tensor(item.sampler_logprobs)[torch.tensor(item.loss_mask)] for item in batch]
    owner = torch.cat([torch.full((len(part),), index) for index, part in enumerate(ours)])
    found, _ = policy_loss(
        loss,
        torch.cat(ours),
        torch.cat(sampled),
        torch.tensor([item.advantage for item in batch])[owner],
        torch.ones(len(owner), dtype=torch.bool),
        owner,
        reference_logprobs=reference,
        max_completion_length=engine.session.train.sequence_len,
    )
    return found


class KeepGradients:
    """Stands in for the optimiser's step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, torch.Tensor] = {}
        keep = self.found

        def step(optimizer: Optimizer, step: int) -> StepOutcome:
            keep.update({name: w.grad.clone() for name, w in optimizer._weights.items() if w.grad is not None})
            optimizer.discard()
            return StepOutcome(1.0, 0.0, True)

        monkeypatch.setattr(Optimizer, "step", step)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_gradient_is_that_of_an_unpacked_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: dict[str, Any]
) -> None:
    engine, _ = grpo_engine(model, tmp_path, loss=loss)
    shake_adapter(engine)
    kept = KeepGradients(monkeypatch)
    metrics = engine.train_step(1, samples())
    expected = naive_loss(engine, engine.session.train.loss, samples())
    trainable = engine.session.policy.trainable()
    gradients = torch.autograd.grad(expected, list(trainable.values()))
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
    for name, gradient in zip(trainable, gradients, strict=True):
        scale = float(gradient.abs().max())
        torch.testing.assert_close(kept.found[name], gradient, rtol=1e-4, atol=2e-5 * scale + 1e-9)


def episodes() -> list[trainer.TrainingSample]:
    """Rollouts of several turns: what the environment said in between is not trained on, and has no logprob."""
    draw = random.Random(3)
    found = samples(8, seed=3)
    for item in found:
        for start in range(3, len(item.token_ids) - 1, 7):
            for position in range(start, min(start + draw.randint(1, 4), len(item.token_ids) - 1)):
                item.loss_mask[position], item.sampler_logprobs[position] = False, 0.0
    return found


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2], LOSSES[4], LOSSES[9]], ids=str)
def test_episodes_train_as_the_formulas_say(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: dict[str, Any]
) -> None:
    """Loss and d loss / d logprob in float64 by the formulas, the rest of the gradient by the plain model."""
    engine, _ = grpo_engine(model, tmp_path, loss=loss)
    shake_adapter(engine)
    kept = KeepGradients(monkeypatch)
    metrics = engine.train_step(1, episodes())
    policy = engine.session.policy
    with torch.no_grad(), policy.without_adapter():
        reference = torch.cat([plain_logprobs(engine, item) for item in episodes()])
    ours = torch.cat([plain_logprobs(engine, item) for item in episodes()])
    tokens = [
        {"q": q, "a": item.advantage, "m": True, "s": item.sample_id}
        for item in episodes()
        for q, trained in zip(item.sampler_logprobs, item.loss_mask, strict=True)
        if trained
    ]
    for token, p, ref in zip(tokens, ours.tolist(), reference.tolist(), strict=True):
        token |= {"p": p, "ref": ref}
    assert len(tokens) < sum(len(item.token_ids) for item in episodes()) / 1.5
    config = engine.session.train.loss.root
    assert metrics["loss"] == pytest.approx(loss_reference.loss(config, tokens), rel=1e-5, abs=1e-7)
    coefficients = torch.tensor(loss_reference.gradient(config, tokens), dtype=torch.float64)
    trainable = policy.trainable()
    gradients = torch.autograd.grad((coefficients * ours).sum(), list(trainable.values()))
    for name, gradient in zip(trainable, gradients, strict=True):
        scale = float(gradient.abs().max())
        torch.testing.assert_close(kept.found[name], gradient, rtol=1e-4, atol=2e-5 * scale + 1e-9)


def plain_logprobs(engine: Engine, item: trainer.TrainingSample) -> torch.Tensor:
    """Logprobs of the trained tokens of one sample, in float64 from the logits on."""
    ids = torch.tensor([item.token_ids])
    logits = engine.session.policy.model(input_ids=ids, use_cache=False).logits[0, :-1].double() / item.temperature
    picked = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return picked[torch.tensor(item.loss_mask)[1:]]


def test_full_weights_too_with_a_reference_of_their_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = grpo_engine(model, tmp_path, lora=False, loss={"type": "grpo", "beta": 0.5})
    kept = KeepGradients(monkeypatch)
    engine.train_step(1, samples())
    assert engine.session.reference is not None
    assert set(kept.found) == set(weights(engine))


@pytest.mark.parametrize(
    "train", [{"per_device_train_batch_size": 1}, {"single_sample_bins": True}, {"sequence_len": 500}]
)
def test_the_cut_into_micro_batches_does_not_matter(model: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    reference, _ = grpo_engine(model, tmp_path / "a")
    engine, _ = grpo_engine(model, tmp_path / "b", **train)
    expected, found = reference.train_step(1, samples()), engine.train_step(1, samples())
    for name in ("loss", "entropy", "ratio/mean", "ratio/max", "mismatch_kl", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_repeats_are_equal_to_the_bit_and_the_order_of_arrival_does_not_matter(model: Path, tmp_path: Path) -> None:
    results = []
    for name, shuffle in (("a", False), ("b", False), ("c", True)):
        engine, _ = grpo_engine(model, tmp_path / name)
        for step in (1, 2, 3):
            arrived = samples(seed=step)
            if shuffle:
                random.Random(step).shuffle(arrived)
            engine.train_step(step, arrived)
        results.append(weights(engine))
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name])
        assert torch.equal(weight, results[2][name])


def test_logprobs_are_those_of_plain_transformers(model: Path, tmp_path: Path) -> None:
    engine, _ = grpo_engine(model, tmp_path, lora=False)
    plain = AutoModelForCausalLM.from_pretrained(model)
    sequences = [list(item.token_ids) for item in samples(20) if len(item.token_ids) > 1]
    request = trainer.ComputeLogprobsRequest(
        sequences=[{"ids": ids} for ids in sequences],
        temperature=0.7,
    )
    for ids, found in zip(sequences, engine.compute_logprobs(request).sequences, strict=True):
        tokens = torch.tensor([ids])
        expected = (plain(tokens).logits[0, :-1].double() / 0.7).log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        assert list(found.logprobs) == pytest.approx(expected.tolist(), abs=1e-5)


def test_every_metric_of_a_step(model: Path, tmp_path: Path) -> None:
    engine, _ = grpo_engine(model, tmp_path)
    metrics = engine.train_step(1, samples())
    names = {"loss", "lr", "grad_norm", "entropy", "ratio/mean", "ratio/max", "mismatch_kl", "masked/fraction"}
    names |= {"tokens_per_second", "time/train", "packing/efficiency", "memory/peak_bytes", "update/skipped"}
    assert names <= set(metrics)


def test_samples_that_cannot_be_trained_on_change_nothing(model: Path, tmp_path: Path) -> None:
    engine, _ = grpo_engine(model, tmp_path)
    before = weights(engine)
    long, penalised = sample("long", [5] * 65, 1), sample("r", [5, 6, 7], 1)
    penalised.repetition_penalty = 1.1
    silent = sample("silent", [5, 6, 7], 3)
    for bad, said in ((long, "sequence_len is 64"), (penalised, "repetition_penalty"), (silent, "no sample")):
        with pytest.raises(InvalidInputError, match=said):
            engine.train_step(1, [bad])
    assert engine.session.step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())


def test_a_sample_without_trained_tokens_counts_and_does_not_hurt(model: Path, tmp_path: Path) -> None:
    engine, _ = grpo_engine(model, tmp_path, single_sample_bins=True, per_device_train_batch_size=1)
    metrics = engine.train_step(1, [*samples(), sample("silent", [5, 6, 7], 3)])
    assert metrics["loss"] == metrics["loss"]


def test_steps_that_are_not_finite_are_skipped_and_then_fail_the_session(model: Path, tmp_path: Path) -> None:
    engine, reporter = grpo_engine(model, tmp_path)
    before = weights(engine)
    poison = [sample("a", [5, 6, 7], 1, advantage=float("inf"))]
    for step in (1, 2):
        assert engine.train_step(step, poison)["update/skipped"] == 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    assert "its update was skipped" in reporter.warnings[-1]
    with pytest.raises(InternalError, match="3 steps in a row") as error:
        engine.train_step(3, poison)
    assert error.value.reason == "NOT_FINITE"


def test_dropout_is_off_and_said_to_be(model: Path, tmp_path: Path) -> None:
    engine, reporter = grpo_engine(model, tmp_path, lora_dropout=0.5)
    assert any("lora_dropout is 0 in GRPO" in warning for warning in reporter.warnings)
    assert all(module.p == 0 for module in engine.session.policy.model.modules() if type(module) is torch.nn.Dropout)
