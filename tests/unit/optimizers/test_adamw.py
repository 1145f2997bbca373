"""A step is left out wholly or not at all, for the reasons given, and a continued run decides like the uninterrupted one."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_scale.optimizers.adamw import REMEMBERED, SkippingAdamW, SkipStepRule

CPU = torch.device("cpu")


def optimizer(deviations: float = 0.0) -> tuple[SkippingAdamW, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(7, 3, generator=generator, requires_grad=True), torch.randn(5, generator=generator, requires_grad=True)]
    groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
    adam = SkippingAdamW(groups, (0.9, 0.95), 1e-8, SkipStepRule(deviations, CPU))
    for group in adam.param_groups:
        group["lr"] = 1e-2
    return adam, weights


def step(adam: SkippingAdamW, weights: list[torch.Tensor], number: int, norm: float) -> None:
    generator = torch.Generator().manual_seed(number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator) if math.isfinite(norm) else torch.full(weight.shape, math.nan)
    adam.begin(lambda: torch.tensor(norm))
    adam.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_no_number_changes_nothing(bad: float) -> None:
    (adam, weights), (plain, same) = optimizer(), optimizer()
    for number in range(3):
        step(adam, weights, number, 1.0)
        step(plain, same, number, 1.0)
    step(adam, weights, 3, bad)
    assert adam.rule.counts.tolist() == [3, 1, 1]
    for number in range(3, 5):  # as if the bad one had never been
        step(adam, weights, number, 1.0)
        step(plain, same, number, 1.0)
    for one, other in zip(weights, same, strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(adam.state[one][kind], plain.state[other][kind]) for kind in ("step", "exp_avg", "exp_avg_sq"))
    assert adam.rule.counts.tolist() == [5, 1, 0]


def test_otherwise_it_is_adamw() -> None:
    adam, weights = optimizer()
    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    groups = [{"params": copies[:1], "weight_decay": 0.1}, {"params": copies[1:], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    for number in range(10):
        step(adam, weights, number, 1.0)
        for weight, copy in zip(weights, copies, strict=True):
            copy.grad = weight.grad
        plain.step()
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(weight, copy, rtol=1e-6, atol=1e-6)


def decisions(rule: SkipStepRule, norms: list[float]) -> list[float]:
    return [rule.should_skip(torch.tensor(norm)).item() for norm in norms]


def test_a_spike_stands_out_of_what_is_remembered() -> None:
    usual = [1.0 + 0.1 * math.sin(7 * k) for k in range(3 * REMEMBERED)]
    rule = SkipStepRule(6.0, CPU)
    assert decisions(rule, [1.0, 50.0]) == [0, 0], "nothing is known yet"
    assert not any(decisions(rule, usual))
    assert decisions(rule, [1.4, 1.45, 9.0, 9.0, 9.0]) == [0, 0, 1, 1, 1], "spikes are not remembered, or they would become usual"
    assert rule.counts.tolist()[1:] == [3, 3]
    assert decisions(rule, [1.0]) == [0] and rule.counts[2] == 0
    assert decisions(SkipStepRule(0.0, CPU), [*usual, 1e9]) == [0] * (len(usual) + 1), "switched off"


def test_a_continued_rule_decides_alike() -> None:
    generator = torch.Generator().manual_seed(2)
    norms = (torch.randn(400, generator=generator).abs() ** 3).tolist()
    whole, first, then = SkipStepRule(2.0, CPU), SkipStepRule(2.0, CPU), SkipStepRule(2.0, CPU)
    expected = decisions(whole, norms)
    found = decisions(first, norms[:171])
    then.load(first.state())
    assert found + decisions(then, norms[171:]) == expected and 0 < sum(expected) < 100
    assert then.state() == whole.state()


def test_a_loss_on_another_level_is_not_a_spike_where_the_rule_is_told() -> None:
    usual = [1.0 + 0.1 * math.sin(7 * k) for k in range(200)]
    twice = [2 * norm for norm in usual]
    told, deaf = SkipStepRule(6.0, CPU), SkipStepRule(6.0, CPU)
    assert not any(decisions(told, usual)) and not any(decisions(deaf, usual))
    told.forget()
    then = SkipStepRule(6.0, CPU)
    then.load(told.state())
    assert not any(decisions(told, twice)) and not any(decisions(then, twice))
    assert all(decisions(deaf, twice)), "what forgets nothing refuses for ever"
    assert decisions(told, [9.0]) == [1] and told.counts.tolist() == [400, 1, 1]
    earlier = told.state()
    del earlier["known"]
    then.load(earlier)
    assert then.known == 400
