"""The transformer of Diffusion Policy."""

import pytest
import torch

from lightning_robot.networks.diffusion_transformer import DiffusionTransformer


def small(**arguments):
    torch.manual_seed(0)
    options = {"layers": 2, "heads": 2, "width": 16, "attention_dropout": 0.0}
    made = DiffusionTransformer(3, 6, 2, 5, **options | arguments)
    for parameter in made.parameters():  # nothing is zero by chance
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_published_size():
    with torch.device("meta"):
        made = DiffusionTransformer(10, 10, 2, 137)
    width = 256
    layer = (3 + 1 + 3 + 1) * width * width + 8 * width + 8 * width * width + 5 * width + 6 * width
    embeddings = (10 + 1) * width + (137 + 1) * width + (10 + 3) * width
    memory = 8 * width * width + 5 * width
    assert sum(p.numel() for p in made.parameters()) == 8 * layer + embeddings + memory + 2 * width + 10 * (width + 1)


@pytest.mark.parametrize("condition_layers", [0, 2])
@pytest.mark.parametrize("task_size", [0, 4])
def test_conditioning_per_step_is_that_of_training(condition_layers, task_size):
    made = small(condition_layers=condition_layers, task_size=task_size)
    x, condition, timesteps = torch.randn(3, 6, 3), torch.randn(3, 10 + task_size), torch.tensor([90, 40, 0])
    for t, prepared in zip(timesteps, made.conditioning_per_step(timesteps, condition), strict=True):
        expected = made(x, made.conditioning(t.expand(3), condition))
        torch.testing.assert_close(made(x, prepared), expected)


def test_attention_is_causal():
    """An action sees no later action, and no observation of a later step; time step and task it always sees."""
    made = small(task_size=4)
    x, condition, t = torch.randn(1, 6, 3), torch.randn(1, 14), torch.tensor([7])
    base = made(x, made.conditioning(t, condition))

    def changed(x=x, condition=condition, t=t):
        """The first action that differs."""
        steps = (made(x, made.conditioning(t, condition)) - base).abs().amax((0, 2)) > 1e-6
        return steps.tolist()

    later = x.clone()
    later[:, 3] += 1
    assert changed(x=later) == [False] * 3 + [True] * 3
    for first, begin, end in ((0, 0, 5), (1, 5, 10), (0, 10, 14)):
        other = condition.clone()
        other[:, begin:end] += 1
        assert changed(condition=other) == [step >= first for step in range(6)]
    assert all(changed(t=torch.tensor([80])))
    free = small(task_size=4, causal=False)
    assert (free(later, free.conditioning(t, condition)) - free(x, free.conditioning(t, condition))).abs().amax(
        (0, 2)
    ).min() > 0


def test_every_parameter_gets_a_gradient_and_decay_is_for_matrices():
    made = small(condition_layers=1, task_size=4)
    made(torch.randn(2, 6, 3), made.conditioning(torch.tensor([3, 50]), torch.randn(2, 14))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in made.parameters())
    bare = {id(parameter) for parameter in made.undecayed()}
    for name, parameter in made.named_parameters():
        assert (id(parameter) in bare) == (parameter.ndim != 2), name


def test_initial_weights():
    torch.manual_seed(0)
    made = DiffusionTransformer(3, 6, 2, 5)
    assert made.layers[0].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert made.layers[0].attention.query.bias.abs().max() == 0
    assert made.action_positions.std().item() == pytest.approx(0.02, rel=0.1)


def test_compiles_as_one_graph():
    made = small()
    x, memory = torch.randn(2, 6, 3), made.conditioning(torch.tensor([3, 99]), torch.randn(2, 10))
    names, expected = list(made.state_dict()), made(x, memory)
    made.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(made(x, memory), expected)
    assert list(made.state_dict()) == names


def test_widths_are_checked():
    with pytest.raises(ValueError, match="width=10 must be even and a multiple of heads=4"):
        small(width=10, heads=4)
