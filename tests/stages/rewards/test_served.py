"""Reward models in servers: scripted ones that die, and real ones of vLLM."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from schemas.base import UserError
from schemas.rl import ServersConfig
from stages.forward import Sequences
from stages.rewards.models import load_scorer, outcome_scores, step_scores
from stages.rewards.served import ServedModel, serve_model
from stages.rollout.replicas import LocalReplica
from tests.stages.rollout import fake_server
from tests.stages.rollout.tiny import letters, llama

WITH_VLLM = importlib.util.find_spec("vllm") is not None
SEQUENCES = Sequences([[5, 6, 7], [4], [3, 9, 8, 4, 10]], [[8, 3, 9], [6, 6], [12, 3, 4, 5]])
STEP_ENDS = [[0, 2], [], [3]]


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    folder = tmp_path / "faults"
    folder.mkdir()
    return folder


@pytest.fixture
def scripted(faults: Path) -> Iterator[ServedModel]:
    command = [sys.executable, str(fake_server.__file__), "--faults", str(faults)]
    replicas = [LocalReplica(f"server {index}", command, {}) for index in range(2)]
    model = ServedModel(replicas, ServersConfig(count=2, start_timeout=60))
    yield model
    model.close()
    assert all(replica.pid is None for replica in replicas)


@pytest.mark.parametrize("fault", [None, "kill"])
def test_scores_are_read_at_their_tokens(
    scripted: ServedModel, faults: Path, fault: str | None
) -> None:
    if fault is not None:
        (faults / fault).touch()
    found = outcome_scores(scripted, SEQUENCES, max_tokens=8)
    assert found.tolist() == [38 / 8, 16 / 8, 58 / 8]
    steps = step_scores(scripted, SEQUENCES, STEP_ENDS, max_tokens=8)
    assert [own.shape for own in steps] == [(2,), (0,), (1,)]
    # Logits [26 / 8, 3 / 2] and [38 / 8, 5 / 2] of the first, [58 / 8, 8 / 2] of the last.
    expected = [1 / (1 + math.exp(26 / 8 - 1.5)), 1 / (1 + math.exp(38 / 8 - 2.5))]
    assert steps[0].tolist() == pytest.approx(expected)
    assert steps[2].item() == pytest.approx(1 / (1 + math.exp(58 / 8 - 4)))


@pytest.mark.skipif(WITH_VLLM, reason="vLLM is installed")
def test_a_machine_without_vllm_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'posttrain\[vllm\]'(?s:.*)engine to torch"):
        serve_model(tmp_path, ServersConfig())


@pytest.mark.vllm
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not WITH_VLLM, reason="vLLM is not installed")
@pytest.mark.parametrize("kind", ["outcome", pytest.param("process", marks=pytest.mark.slow)])
def test_vllm_agrees_with_torch_to_1e_4(tmp_path: Path, kind: str) -> None:
    """In float32; both add the numbers of a token up in another order."""
    folder = tmp_path / "model"
    with_head(tmp_path / "base", kind).save_pretrained(folder)
    letters(64).save_pretrained(folder)
    own = load_scorer(folder, kind, torch.device("cpu"), "float32")
    served = serve_model(folder, ServersConfig(start_timeout=1200))
    try:
        if kind == "outcome":
            found, expected = (outcome_scores(m, SEQUENCES, 64) for m in (served, own))
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
            assert expected.std() > 0.05
        else:
            pairs = zip(
                *(step_scores(m, SEQUENCES, STEP_ENDS, 64) for m in (served, own)), strict=True
            )
            for steps, exact in pairs:
                assert torch.allclose(steps, exact, atol=1e-4, rtol=1e-4)
    finally:
        served.close()


def with_head(base: Path, kind: str) -> PreTrainedModel:
    from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

    llama(0, tied=True).save_pretrained(base)
    torch.manual_seed(3)
    if kind == "outcome":
        return LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    model = LlamaForTokenClassification.from_pretrained(base, num_labels=2)
    with torch.no_grad():
        model.score.bias.copy_(torch.tensor([0.3, -0.2]))
    return model
