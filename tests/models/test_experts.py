"""Experts of a mixture, whose weights are 3-d Parameters: each under PST as a layer by itself would be."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import toys
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pst_kernels as pst
from pst_kernels import reference
from pst_kernels.layers.experts import PSTExperts
from pst_kernels.model import pst_layers

SIZES = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": toys.VOCABULARY, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral(**changes) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES | changes)).eval()


def gpt_oss(**changes) -> nn.Module:
    """Weights that lie as (experts, in, out), and biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIZES | {"head_dim": 8} | changes)).eval()


FAMILIES = {"mixtral": mixtral, "gpt_oss": gpt_oss}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
TOKENS = torch.arange(18).view(2, 9) + 3


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def under_pst(family: str = "mixtral", **settings) -> nn.Module:
    return toys.perturb(pst.replace_linear(FAMILIES[family](), pst.PSTConfig(**{"sparsity": 0.7} | settings)), 0.3)


def trained(model: nn.Module, steps: int = 2) -> nn.Module:
    for _ in range(steps):
        toys.train_step(model.train(), {"input_ids": TOKENS, "labels": TOKENS})
    return model.eval()


def stacks(model: nn.Module) -> list[PSTExperts]:
    return [layer for _, layer in pst_layers(model) if isinstance(layer, PSTExperts)]


def by_reference(layer: PSTExperts, factors: list[Tensor], through: bool) -> tuple[Tensor, Tensor]:
    """The masks and M * W' of a stack, as the model's Parameter lies, differentiable in the factors."""
    masks, made = [], []
    for weight, *own in zip(layer.oriented(layer.weight.detach()), *factors, strict=True):
        exact = reference.scores(*(t.detach().double() for t in (weight, *own)))
        mask = reference.prune_mask(exact, layer.num_pruned_at(layer.config.sparsity))
        scores = reference.scores(weight, *own, through_magnitude=through)
        masks.append(mask)
        made.append((mask + (scores - scores.detach())) * reference.updated_weight(weight, *own[:2]))
    return torch.stack(masks), layer.oriented(torch.stack(made))


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_outputs_and_gradients_are_those_of_the_reference(family, implementation, through):
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # for which torch has none
    model = FAMILIES[family]().to(dtype)
    model.set_experts_implementation(implementation)
    dense = copy.deepcopy(model.model.layers[0].mlp.experts)
    settings = {"adapter_dtype": dtype, "through_magnitude": through, "sparsity": 0.7}
    toys.perturb(pst.replace_linear(model, pst.PSTConfig(**settings)), 0.3)
    experts = model.model.layers[0].mlp.experts
    layers = {"gate_up_proj": experts.pst_gate_up_proj, "down_proj": experts.pst_down_proj}
    x, chosen = torch.randn(11, 32, dtype=dtype), torch.randint(0, 3, (11, 2))  # nobody chooses the last one
    routing = torch.rand(11, 2, dtype=dtype)
    y = experts(x.requires_grad_(), chosen, routing)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    dx, x.grad = x.grad, None

    leaves = {name: [f.detach().clone().requires_grad_() for f in layer.factors] for name, layer in layers.items()}
    made = {name: by_reference(layer, leaves[name], through) for name, layer in layers.items()}
    weights = {name: weight for name, (_, weight) in made.items()}
    expected = torch.func.functional_call(dense, weights, (x, chosen, routing))
    torch.testing.assert_close(y, expected)
    expected.backward(upstream)
    torch.testing.assert_close(dx, x.grad)
    for name, layer in layers.items():
        assert torch.equal(layer.mask, made[name][0])
        for factor, leaf in zip(layer.factors, leaves[name], strict=True):
            torch.testing.assert_close(factor.grad, leaf.grad)
            assert leaf.grad[:3].abs().sum() > 0


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:16"])
def test_each_expert_is_pruned_as_a_layer_by_itself(pattern):
    settings = {"pattern": pattern, "sparsity": 0.5}
    layer = stacks(under_pst("gpt_oss", **settings))[0]
    masks, masked = layer.mask, layer.masked_weight()
    for i in range(4):
        linear = nn.Linear(layer._shape[1], layer._shape[0], bias=False)
        linear.weight = nn.Parameter(layer.oriented_weight[i].detach().clone())
        alone = pst.PSTLinear.from_linear(linear, layer.config)
        with torch.no_grad():
            for own, factor in zip(alone.factors, layer.factors, strict=True):
                own.copy_(factor[i])
        assert torch.equal(masks[i], alone.mask)
        torch.testing.assert_close(masked[i], alone.masked_weight())
    assert layer.weights_pruned == int((~masks).sum())


def test_with_blocks_the_scores_learn_before_the_next_mask_alone():
    model = under_pst(pattern="block:16", sparsity=0.5, mask_interval=2)
    layer, seen = stacks(model)[0], []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(4):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        seen.append((layer.pst_A.grad.any().item(), layer.pst_U.grad.any().item()))
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [(False, True), (True, True)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_merged_saved_and_loaded_the_outputs_are_the_same(family, tmp_path):
    keys = list(FAMILIES[family]().state_dict())
    model = trained(under_pst(family, train_bias=True))
    expected = logits(model)
    pst.save_pretrained(model, tmp_path / "adapter")
    for fresh in (FAMILIES[family](), under_pst(family, train_bias=True, sparsity=0.5)):
        assert torch.equal(logits(pst.load_pretrained(fresh, tmp_path / "adapter")), expected)
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "whole").eval()), expected)
    status = {row.name: row for row in pst.get_layer_status(model)}
    assert status["model.layers.1.mlp.experts.down_proj"].shape == (4, 32, 40)
    assert status["model.layers.1.mlp.experts.down_proj"].sparsity == 0.7
    assert not pst.merge_and_unload(model, safe_merge=True, format="sparse").training
    assert "forward" not in vars(model.model.layers[0].mlp.experts)
    torch.testing.assert_close(logits(model), expected)
    pruned = pst.merge_and_unload(pst.load_pretrained(FAMILIES[family](), tmp_path / "adapter"))
    assert list(pruned.state_dict()) == keys
    for experts in (pruned.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts):
        assert type(experts.down_proj) is nn.Parameter
        assert (experts.down_proj == 0).sum((1, 2)).tolist() == [int(32 * 40 * 0.7)] * 4
    torch.testing.assert_close(logits(pruned), expected)


def test_what_save_pretrained_writes_is_resumed_bit_for_bit(tmp_path):
    """transformers' own names for the experts in a file are not those of the model."""
    from safetensors.torch import load_file

    model = trained(under_pst())
    model.save_pretrained(tmp_path)
    other = under_pst(sparsity=0.2)
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert result.missing_keys + result.unexpected_keys == []
    assert not toys.differences(toys.snapshot(other), toys.snapshot(model))


def test_merged_experts_say_so_and_come_back():
    model = under_pst()
    expected, before = logits(model), toys.snapshot(model)
    for layer in stacks(model):
        layer.merge()
        layer.merge()
    torch.testing.assert_close(logits(model), expected)
    assert not toys.differences(before, toys.snapshot(model))  # which describes the unmerged model
    with pytest.raises(RuntimeError, match=r"these experts are merged, .* unmerge\(\)"):
        model.train()(input_ids=TOKENS)
    for layer in stacks(model):
        layer.unmerge()
    assert torch.equal(logits(model.eval()), expected)


def test_names_choose_experts_as_they_choose_linears():
    def names(**settings):
        model = pst.replace_linear(mixtral(), pst.PSTConfig(**settings))
        again = pst.replace_linear(model, pst.PSTConfig(**settings))
        assert again is model
        return {row.name.rpartition(".")[2] for row in pst.get_layer_status(model)}

    assert names(target_modules=["q_proj", "gate_up_proj"]) == {"q_proj", "gate_up_proj"}
    assert names(exclude_modules=["down_proj", "k_proj"]) == {"q_proj", "v_proj", "o_proj", "gate_up_proj"}
    assert names(exclude_modules=r".*\.experts\..*") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert names(target_modules=lambda module, _: hasattr(module, "num_experts")) >= {"gate_up_proj", "down_proj"}
    with pytest.raises(ValueError, match=r"names 'gate_up_prj', which matches nothing; did you mean 'gate_up_proj'"):
        names(exclude_modules=["gate_up_prj"])


def test_the_share_of_the_blocks_that_is_under_pst(capsys, caplog):
    model = pst.replace_linear(mixtral())
    pst.print_trainable_parameters(model)
    assert "of the blocks' weights" not in capsys.readouterr().out
    assert caplog.text == ""
    model = pst.replace_linear(mixtral(), pst.PSTConfig(exclude_modules=r".*\.experts\..*"))
    pst.print_trainable_parameters(model)
    assert "|| 16.6 % of the blocks' weights are under PST\n" in capsys.readouterr().out


def test_scores_rest_and_masks_are_fixed_as_those_of_linears_are(tmp_path):
    model = under_pst(score_interval=2, freeze=0.3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule, seen = pst.SparsitySchedule(model, 6), []
    for _ in range(7):
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        layers = [layer for _, layer in pst_layers(model)]
        learn = [(bool(m.pst_A.grad is not None and m.pst_A.grad.any()), bool(m.pst_U.grad.any())) for m in layers]
        assert len(set(learn)) == 1
        seen.append(learn[0][0])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert seen == [False, True, False, True, False, False, False]
    before, expected = toys.snapshot(model.eval()), logits(model)
    assert not toys.differences(before, toys.snapshot(model))
    pst.save_sparse(model, tmp_path)
    torch.testing.assert_close(logits(pst.load_sparse(tmp_path).eval()), expected)
    torch.testing.assert_close(logits(pst.merge_and_unload(model)), expected)
    with pytest.raises(TypeError, match=r"gate_up_proj belongs to experts, whose kept weights PST does not train"):
        pst.replace_linear(mixtral(), pst.PSTConfig(target_modules=["gate_up_proj"], freeze=0.2, train_kept=True))
    with pytest.raises(TypeError, match=r"gate_up_proj belongs to experts, whose magnitudes PST does not weigh"):
        pst.replace_linear(mixtral(), pst.PSTConfig(target_modules=["gate_up_proj"], magnitude="fisher"))


def test_experts_of_a_kind_that_is_not_known_stay_dense_and_are_said(caplog):
    from transformers import DbrxConfig, DbrxForCausalLM

    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": toys.VOCABULARY}
    of_experts = {"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 32}
    config = DbrxConfig(**sizes, ffn_config=of_experts, attn_config={"rope_theta": 1e4})
    model = pst.replace_linear(DbrxForCausalLM(config))
    assert "% of the weights of the blocks are in no linear layer, and stay dense: transformer.blocks.0" in caplog.text
    with pytest.raises(ValueError, match=r"names 'w1', which matches no linear .* a parameter with 2 dim"):
        pst.replace_linear(model, pst.PSTConfig(target_modules=["Wqkv", "w1"]))


def test_copies_pickles_threads_and_compiled_graphs_compute_the_same():
    model = under_pst()
    expected = logits(copy.deepcopy(model))
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(lambda _: logits(model), range(8)))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), expected)
    experts = model.model.layers[0].mlp.experts
    arguments = torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    torch.compile(experts, backend="aot_eager", fullgraph=True)(*arguments).sum().backward()
    gradients = {name: p.grad.clone() for name, p in experts.named_parameters() if p.grad is not None}
    experts.zero_grad()
    experts(*arguments).sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(experts.get_parameter(name).grad, gradient)
    assert len(gradients) == 12


def test_experts_that_are_parametrised_after_the_conversion_are_refused():
    model = under_pst()
    experts = model.model.layers[1].mlp.experts
    parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.experts.down_proj is no parameter .* target_parameters"):
        logits(model)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_weights_size_is_kept_for_the_backward(family, implementation):
    model = under_pst(family, masked_weight="remake")
    model.set_experts_implementation(implementation)
    experts, kept = model.model.layers[0].mlp.experts, []
    arguments = torch.randn(6, 32, requires_grad=True), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    y = experts(*arguments)
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        raw = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved")]
        kept += [one for saved in raw for one in (saved if isinstance(saved, (tuple, list)) else [saved])]
    own = {t.untyped_storage().data_ptr() for t in (*experts.parameters(), *experts.buffers())}
    sizes = [one.data.numel() for one in kept if isinstance(one.data, Tensor) and one.data.data_ptr() not in own]
    assert max(sizes, default=0) < 32 * 40
    y.sum().backward()
    with torch.no_grad():
        stacks(model)[0].pst_U.add_(1)
    y = experts(*arguments)
    with torch.no_grad():
        stacks(model)[0].pst_U.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_kept_or_remade_the_weights_are_the_same():
    losses = {}
    for choice in ("keep", "remake"):
        model = under_pst(masked_weight=choice)
        batch = {"input_ids": TOKENS, "labels": TOKENS}
        losses[choice] = [toys.train_step(model.train(), batch) for _ in range(3)]
        assert torch.equal(logits(model.eval()), logits(model))
    torch.testing.assert_close(losses["keep"], losses["remake"])
