"""Functions with hand-written gradients against autograd, and what is replaced by them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama

from schemas.training import LoRAConfig, Precision
from stages import lean_layers
from stages.adapters import add_adapters
from stages.core import products
from stages.forward import Sequences, completion_logprobs, hidden_states
from stages.gradient_checkpointing import use_gradient_checkpointing
from stages.layer_functions import GatedMLP, Linear, RMSNorm, Rotation
from stages.lean_layers import use_lean_layers
from stages.packing import pack
from stages.precision import computing, use_precision, weights_held


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [one.clone().requires_grad_() for one in inputs]
    output = function(*leaves)
    output.backward(drawn(*output.shape))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5)


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


ANGLES = drawn(1, 5, 4).repeat(1, 1, 2)


def rotation(x: Tensor) -> Tensor:
    """As multiplication of complex numbers, a half being real parts and a half imaginary ones."""
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * ANGLES[..., :4])
    return torch.cat([turned.real, turned.imag], dim=-1)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
    "norm": (
        lambda x, w: RMSNorm.apply(x, w, 1e-5, x.dtype),
        rms_norm,
        [drawn(2, 5, 6), drawn(6)],
    ),
    "norm that keeps its result": (
        lambda x, w: RMSNorm.apply(x, w, 1e-5, x.dtype, True),
        rms_norm,
        [drawn(2, 5, 6), drawn(6)],
    ),
    "linear": (
        lambda x, w, b: Linear.apply(x, w, b, w.detach()),
        functional.linear,
        [drawn(2, 5, 6), drawn(3, 6), drawn(3)],
    ),
    "gated MLP": (
        lambda x, *maps: GatedMLP.apply(x, *maps, *(m.detach() for m in maps)),
        gated_mlp,
        [drawn(2, 5, 6), drawn(7, 6), drawn(7, 6), drawn(6, 7)],
    ),
    "rotation": (
        lambda x: Rotation.apply(x, ANGLES.cos(), ANGLES.sin()),
        rotation,
        [drawn(1, 3, 5, 8)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_autograd(name: str) -> None:
    ours, plain, inputs = CASES[name]
    for found, expected in zip(gradients(ours, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def model(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options))


IDS = torch.arange(12)[None] % 32


def test_nothing_changes_in_float64() -> None:
    plain, replaced = model().double(), model()
    use_lean_layers(replaced.base_model)
    assert torch.equal(plain(IDS).logits, replaced.double()(IDS).logits)


@pytest.mark.parametrize("least_sides", [0, 2**16])
def test_values_and_gradients_in_float32_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, least_sides: int
) -> None:
    monkeypatch.setattr(products, "_LEAST_SIDES", least_sides)  # by oneDNN, and by torch
    exact, replaced = model().double(), use_precision(model(), "float32")
    ids = torch.arange(512)[None] % 32
    found = {}
    for one in (exact, replaced):
        logits = one(ids).logits
        logits.square().sum().backward()
        found[one] = [logits, *(weight.grad for weight in one.parameters())]
    for ours, theirs in zip(found[replaced], found[exact], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


class Made(TorchDispatchMode):
    """Elements of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        inputs = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        self.sizes += [
            leaf.numel()
            for leaf in tree_leaves(out)
            if isinstance(leaf, Tensor) and leaf._base is None and id(leaf) not in inputs
        ]
        return out


def passes(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> None:
    """One backward pass a row, their gradients added up."""
    for row in rows:
        logprobs, _ = completion_logprobs(model, Sequences([[3]], [row]), len(row))
        logprobs.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_micro_batches_add_up(
    precision: Precision, checkpointing: bool, tied: bool
) -> None:
    rows = [[5, 6, 5], [5, 9], [0, 1, 2, 7]]
    apart = []
    for some in ([rows[0]], [rows[1]], [rows[2]], rows):
        # Token 0 is the one that fills up, whose row autograd leaves alone as an input.
        ours = use_precision(model(tie_word_embeddings=tied, pad_token_id=0), precision).train()
        use_gradient_checkpointing(ours, checkpointing, "sft")
        passes(ours, some)
        apart.append({name: p.grad for name, p in ours.named_parameters()})
    assert apart[3].keys() == apart[0].keys() and len(apart[3]) >= 20
    for name, together in apart[3].items():
        parts = [one[name] for one in apart[:3]]
        torch.testing.assert_close(together, sum(parts[1:], parts[0]), rtol=1e-6, atol=1e-6)
    if not tied:
        assert not apart[3]["model.embed_tokens.weight"][0].any()


def test_only_the_first_micro_batch_makes_a_gradient_as_tall_as_the_embedding() -> None:
    ours = use_precision(model(vocab_size=1024), "float32")
    made = []
    for _ in range(2):
        with Made() as watch:
            hidden_states(ours, pack([[]], [[1, 2, 3]], device=IDS.device)).sum().backward()
        made.append(max(watch.sizes))
    assert made[0] == 1024 * 32 and made[1] < 1024 * 32


def test_every_part_of_a_llama_is_replaced() -> None:
    replaced = use_precision(model(), "bfloat16")
    layers = replaced.base_model.layers
    with_own = [name for name, one in layers.named_modules() if "forward" in vars(one)]
    assert len(with_own) == 2 * (2 + 4 + 1 + 3)  # norms, q k v o, the MLP and its three maps
    assert hasattr(modeling_llama.apply_rotary_pos_emb, "plain")


def test_under_autocast_it_is_what_autocast_gives_but_for_rounding() -> None:
    plain, replaced = model(), use_precision(model(), "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain.base_model(IDS).last_hidden_state
        found = replaced.base_model(IDS).last_hidden_state
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert not torch.equal(found, plain.base_model(IDS).last_hidden_state)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_that_come_later_take_part_and_are_trained(precision: Precision) -> None:
    settings = LoRAConfig.model_validate(
        {"rank": 3, "alpha": 6.0, "target_modules": ["gate_proj", "down_proj", "q_proj"]}
    )
    exact, plain, replaced = model(), model(), use_precision(model(), precision)
    found = []
    for one in (exact, plain, replaced):
        add_adapters(one, settings, section="sft.lora", seed=0)
        with torch.no_grad():
            adapters = {name: w for name, w in one.named_parameters() if "lora_" in name}
            for weight in adapters.values():
                weight.copy_(0.3 * drawn(*weight.shape))
        narrow = precision == "bfloat16" and one is not exact
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            states = one.base_model(IDS).last_hidden_state
        (states * drawn(*states.shape)).sum().backward()
        found.append([states.detach(), *(weight.grad for weight in adapters.values())])
    for right, theirs, ours in zip(*found, strict=True):
        assert ours.norm() > 0
        # As near as autocast alone comes.
        allowed = max(1.2 * (theirs - right).norm().item(), 1e-5 * right.norm().item())
        assert (ours - right).norm() < allowed


def test_what_computes_otherwise_is_left_alone() -> None:
    class Gelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False)
            self.down_proj = nn.Linear(8, 4, bias=False)
            self.act_fn = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class OnePlus(GemmaRMSNorm):
        variance_epsilon = 1e-6

    backbone = nn.Module()
    backbone.layers = nn.ModuleList([Gelu(), OnePlus(4), nn.LayerNorm(4)])
    use_lean_layers(backbone)
    assert all("forward" not in vars(one) for one in backbone.layers)
    assert "forward" in vars(backbone.layers[0].gate_proj)


def test_a_rotation_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(one * cos.unsqueeze(1) for one in (q, k))  # type: ignore[return-value]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    lean_layers._use_rotation(modeling_llama)
    assert modeling_llama.apply_rotary_pos_emb is interleaved


def test_copies_of_weights_live_as_long_as_the_region_and_no_longer() -> None:
    replaced = use_precision(model(), "bfloat16")
    batch = pack([[]], [[1, 2, 3]], device=torch.device("cpu"))

    def states() -> Tensor:
        with computing(replaced), torch.no_grad():
            found: Tensor = replaced.base_model(batch.input_ids).last_hidden_state
        return found

    first = states()
    weight = replaced.base_model.layers[0].mlp.up_proj.weight
    with torch.no_grad(), weights_held(replaced):
        states()
        weight.zero_()
        assert torch.equal(states(), first)  # why no weight may change in a region
    assert not torch.equal(states(), first)


def test_a_deep_copy_has_weights_of_its_own() -> None:
    first = use_precision(model(), "bfloat16")
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert first.base_model(IDS).last_hidden_state.any()
        assert not second.base_model(IDS).last_hidden_state.any()


def test_a_norm_whose_weight_is_zero_somewhere_still_has_its_gradient() -> None:
    """Its result does not say what was multiplied by 0; the gradient of the weight needs to."""
    norm = use_precision(model(), "bfloat16").base_model.layers[0].input_layernorm
    weight, upstream = drawn(32), drawn(1, 5, 32)
    weight[3] = 0.0
    states = [drawn(1, 5, 32).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        norm.weight.copy_(weight)
    with torch.autocast("cpu", torch.bfloat16):
        (norm(states[0]) * upstream).sum().backward()
    plain = weight.clone().requires_grad_()
    (rms_norm(states[1], plain) * upstream).sum().backward()
    torch.testing.assert_close(states[0].grad, states[1].grad, rtol=0.02, atol=0.02)
    torch.testing.assert_close(norm.weight.grad, plain.grad, rtol=0.02, atol=0.02)
    assert plain.grad is not None and plain.grad[3].abs() > 0.1


def test_no_norm_of_a_layer_keeps_float32_states_unless_it_must() -> None:
    def count_wide(replaced: PreTrainedModel) -> int:
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        states = drawn(1, 12, 32).requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            replaced.base_model(inputs_embeds=states, use_cache=False)
        return sum(one.shape == states.shape and one.dtype == torch.float32 for one in kept)

    replaced = use_precision(model(), "bfloat16")
    without = count_wide(replaced)
    with torch.no_grad():
        for layer in replaced.base_model.layers:
            layer.input_layernorm.weight[0] = layer.post_attention_layernorm.weight[0] = 0.0
    assert count_wide(replaced) == without + 2 * 2
