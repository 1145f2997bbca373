"""What a person sees: lines, a bar, plots and a summary, all from what metrics.jsonl holds; only the leader writes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from bd3_scale import messages, plot
from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.costs.flops import training_flops_per_token
from bd3_scale.costs.pipeline_stages import expected_masked
from bd3_scale.distributed.layout import Layout
from bd3_scale.objectives.time_density import TimeDensity
from bd3_scale.recipe import Recipe, load
from bd3_scale.reporting import plots
from bd3_scale.reporting import reporter as reporter_module
from bd3_scale.reporting.metrics import read_metrics
from bd3_scale.reporting.plots import running_mean, series
from bd3_scale.reporting.reporter import Reporter, flops_per_token
from bd3_scale.reporting.summary import summary
from bd3_scale.reporting.tracking import numbers
from bd3_scale.tuning.estimates import CrossEntropy, Validation
from bd3_scale.tuning.interval_tuner import TunerState

ROOT = Path(__file__).resolve().parents[3]
LAYOUT = Layout(0, 1, torch.device("cpu"), tensor=1, tensor_rank=0, pipeline=1, pipeline_rank=0, data=1, data_rank=0)
TRAIN_KEYS = {
    "step", "loss", "data_tokens", "tokens_per_second", "mfu", "learning_rate", "gradient_norm", "interval", "seconds",
}  # fmt: skip
"""What every line of training has, at least."""


def recipe(folder: Path, steps: int = 40) -> Recipe:
    recipe = load(ROOT / "recipes/quickstart.yaml", [f"run.dir={folder}", f"training.steps={steps}"])
    recipe.run.name = "example"
    return recipe


def train(reporter: Reporter, step: int, loss: float) -> dict[str, Any]:
    reporter.add(torch.tensor(loss), torch.tensor(0.5))
    return reporter.train(
        step=step,
        learning_rate=1e-3,
        intervals={4: [0.25, 0.75]},
        flops_per_token=1e9,
        reduce=lambda value: value,
        skipped=torch.zeros(3, dtype=torch.int64),
    )


def validation(nelbo: float) -> Validation:
    return Validation(nelbo=nelbo, standard_error=0.01, perplexity=2.0**nelbo, rows=32)


def a_run(folder: Path, nelbos: tuple[float, ...] = (6.0, 5.0), layout: Layout = LAYOUT, pictures: bool = False) -> Recipe:
    """A run of 10 steps per validation with a line every 5."""
    asked = recipe(folder, steps=10 * len(nelbos))
    asked.tracking.plots = pictures
    reporter = Reporter(asked, layout, folder, first_step=0)
    for index, nelbo in enumerate(nelbos):
        for step in (10 * index + 5, 10 * index + 10):
            train(reporter, step, 8.0 - 0.1 * step)
        reporter.validation(step=10 * index + 10, results={4: validation(nelbo)}, seconds=0.0, unigram_perplexity=90.0)
    reporter.close()
    return asked


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> float:
        self.seconds += seconds
        return self.seconds


def test_lines_have_the_fixed_keys_and_keep_the_two_losses_apart(tmp_path: Path) -> None:
    asked = a_run(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    training = [line for line in lines if line["kind"] == "train"]
    validated = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in training] == [5, 10, 15, 20] and [line["step"] for line in validated] == [10, 20]
    assert all(line.keys() >= TRAIN_KEYS and "nelbo" not in line for line in training)
    assert all(line.keys() >= {"step", "nelbo", "perplexity"} and "loss" not in line for line in validated)
    assert training[-1]["data_tokens"] == asked.tokens_before(20)
    assert training[-1]["mfu"] is None, "a CPU has no peak that anybody knows"
    assert load(tmp_path / "recipe.yaml") == asked, "the resolved recipe stands beside"


def test_other_ranks_measure_but_write_nothing(tmp_path: Path) -> None:
    a_run(tmp_path / "run", layout=replace(LAYOUT, rank=1, world_size=2, data=2, data_rank=1))
    assert not (tmp_path / "run").exists()


def test_plain_lines_say_how_far_how_well_how_fast_and_how_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(recipe(tmp_path), LAYOUT, tmp_path, first_step=20)
    line = train(reporter, 30, 4.5)
    reporter.meter.peak_flops = 1e12
    train(reporter, 40, 4.25)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 30/40: loss 4.5000, ") and "lr 1.00e-03, ETA " in first and "MFU" not in first
    assert f"{line['tokens_per_second']:,.0f} data tokens/s" in first
    assert ", MFU " in second and second.endswith("ETA 00:00")


def test_a_ramp_has_its_tokens_and_the_time_left_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, clock = recipe(tmp_path), Clock()
    asked.training.global_batch = [[0, 8], [160, 16]]
    monkeypatch.setattr("time.perf_counter", clock)
    reporter = Reporter(asked, LAYOUT, tmp_path, first_step=10)
    clock.advance(10.0)
    line = train(reporter, 20, 4.5)
    assert capsys.readouterr().err.endswith("ETA 00:40\n"), "20 steps of twice the rows"
    context = asked.model.context
    assert line["data_tokens"] == 160 * context and line["tokens_per_second"] == pytest.approx(8 * context)
    clock.advance(10.0)
    line = train(reporter, 25, 4.5)
    assert line["data_tokens"] == 240 * context and line["tokens_per_second"] == pytest.approx(8 * context)


def test_terminal_has_one_line_that_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    reporter = Reporter(recipe(tmp_path), LAYOUT, tmp_path, first_step=20)
    train(reporter, 30, 4.5)
    reporter.bar.refresh()
    assert "\n" not in terminal.getvalue()
    assert "30/40" in terminal.getvalue() and "loss 4.5000" in terminal.getvalue()
    messages.show()
    reporter.say("a line for people")
    reporter.close()
    assert "a line for people\n" in terminal.getvalue()


def test_no_progress_means_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = recipe(tmp_path)
    asked.tracking.progress = False
    train(Reporter(asked, LAYOUT, tmp_path, first_step=0), 10, 4.5)
    assert capsys.readouterr().err == ""


def test_plots_take_little_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn at the first validation, not again while a hundred times its duration has not passed, and at the end; or never."""
    drawn: list[float] = []
    monkeypatch.setattr(reporter_module, "draw", lambda runs, folder: drawn.append(now.advance(1.5)))
    for drawing, expected in ((True, [2.5, 154.0, 255.5]), (False, [])):
        now, asked = Clock(), recipe(tmp_path / str(drawing))
        monkeypatch.setattr(reporter_module.time, "perf_counter", now)
        asked.tracking.plots = drawing
        reporter = Reporter(asked, LAYOUT, tmp_path / str(drawing), first_step=0)
        now.advance(1)
        train(reporter, 10, 4.5)
        for _ in range(5):
            reporter.plot()
            now.advance(50)
        reporter.close()
        assert drawn == pytest.approx(expected)
        drawn.clear()


def test_plots_can_be_made_again_from_the_file_alone(tmp_path: Path) -> None:
    a_run(tmp_path, pictures=True)
    pictures = sorted((tmp_path / "report").glob("*.png"))
    assert [picture.name for picture in pictures] == ["loss.png", "perplexity.png", "throughput.png"]
    before = matplotlib.image.imread(pictures[1])
    assert before.std() > 0.01, "the picture is empty"
    for picture in pictures:
        picture.unlink()
    assert plot.main([str(tmp_path)]) == 0
    assert (matplotlib.image.imread(pictures[1]) == before).all()


def test_plots_hold_the_runs_points_and_the_unigram_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs in each picture, by the numbers that the file has; a loss that is not a number leaves a gap."""
    drawn: dict[str, Any] = {}
    original = plots._figure

    def remember(runs: Any, kind: str, key: str, label: str) -> Any:
        drawn[key] = original(runs, kind, key, label)
        return drawn[key]

    monkeypatch.setattr(plots, "_figure", remember)
    for name in ("one/same", "two/same"):
        a_run(tmp_path / name)
    with open(tmp_path / "one/same/metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": 25, "data_tokens": 1, "loss": "nan"}) + "\n")
    assert plot.main([str(tmp_path / "one/same"), str(tmp_path / "two/same"), "--out", str(tmp_path / "both")]) == 0
    assert len(list((tmp_path / "both").glob("*.png"))) == 3
    loss, perplexity = drawn["loss"].axes[0], drawn["perplexity"].axes[0]
    assert [list(line.get_ydata()) for line in loss.lines] == [[7.5, 7.0, 6.5, 6.0]] * 2
    assert len({line.get_label() for line in loss.lines}) == 2, "two folders of one name are two runs"
    assert [90.0, 90.0] in [list(line.get_ydata()) for line in perplexity.lines]
    assert [64.0, 32.0] in [list(line.get_ydata()) for line in perplexity.lines]


def test_a_mixture_has_a_curve_and_a_map_for_each_block_size(tmp_path: Path) -> None:
    def tuned(step: int, size: int, interval: list[float]) -> dict[str, Any]:
        variances = [{"interval": interval, "variance": 1.0}]
        return {"kind": "tuner", "step": step, "block_size": size, "interval": interval, "variances": variances}

    sizes = {"4": {"perplexity": 20.0}, "16": {"perplexity": 30.0}}
    measured = {"kind": "validation", "step": 5, "data_tokens": 50, "perplexity": 20.0, "unigram_perplexity": 90.0, "block_sizes": sizes}
    paths = [(4, [0.1, 0.9]), (16, [0.5, 1.0]), (4, [0.2, 0.8])]
    lines = [measured, *(tuned(step, size, interval) for step, (size, interval) in enumerate(paths))]
    curves = plots._figure({"run": lines}, "validation", "perplexity", "").axes[0].lines
    assert {line.get_label(): list(line.get_ydata()) for line in curves[:2]} == {"run, L' = 4": [20.0], "run, L' = 16": [30.0]}
    assert len(curves) == 3, "one unigram model"
    maps = plots._tuner_figure({"run": lines}).axes
    chosen = {axes.get_title(): list(axes.lines[0].get_xdata()) for axes in maps if axes.lines}
    assert chosen == {"run, L' = 4, step 2": [0.1, 0.2], "run, L' = 16, step 1": [0.5]}
    reporter = Reporter(recipe(tmp_path), LAYOUT, tmp_path, first_step=0)
    reporter.add(torch.tensor(1.0), torch.tensor(0.5))
    both = {4: [0.1, 0.9], 16: [0.5, 1.0]}
    line = reporter.train(
        step=10, learning_rate=1e-3, intervals=both, flops_per_token=1e9, reduce=lambda value: value, skipped=torch.zeros(3)
    )
    reporter.close()
    assert line["interval"] == [0.1, 0.9] and line["intervals"] == {"4": [0.1, 0.9], "16": [0.5, 1.0]}


def test_plot_tool_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main([str(tmp_path)]) == 1
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert plot.main([str(tmp_path)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "holds no metrics.jsonl" in errors[0] and "no train or validation line yet" in errors[1]
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), str(tmp_path)])
    assert "several runs need --out" in capsys.readouterr().err


def test_plots_that_fail_do_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporter_module, "draw", full)
    a_run(tmp_path, pictures=True)
    assert "no plots (OSError" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 20


def test_running_mean_and_series() -> None:
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    lines = [{"kind": "train", "data_tokens": n, "mfu": value} for n, value in enumerate([None, 0.5, "nan", True])]
    assert series(lines, "train", "mfu") == ([1], [0.5])


def test_summary_says_what_was_reached_and_what_to_do_next(tmp_path: Path) -> None:
    asked = a_run(tmp_path / "a run", nelbos=(6.0, 4.0, 5.0))
    checkpoint = tmp_path / "a run" / "checkpoints" / "step_00000030"
    text = summary(asked, step=30, checkpoint=checkpoint, validated=validation(5.0), unigram=90.0, stopped=None)
    assert "finished: 30 of 30 steps" in text and f"{asked.tokens_before(30):,} data tokens" in text
    assert "validation  perplexity 32.00 (NELBO 5.0000 +- 0.0100 nats per data token) on 32 held-out rows\n" in text
    assert "best        perplexity 16.00 (NELBO 4.0000 +- 0.0100 nats per data token) at step 20" in text
    assert "unigram     perplexity 90.00 of the same rows; the model's is 0.36 of it" in text
    assert str(checkpoint) in text and f"bd3 sample '{tmp_path}/a run'" in text
    assert "continue" not in text


def test_summary_of_a_start_that_validated_nothing_remembers_the_last(tmp_path: Path) -> None:
    asked = a_run(tmp_path)
    asked.training.steps = 50
    checkpoint = tmp_path / "checkpoints" / "step_00000025"
    text = summary(asked, step=25, checkpoint=checkpoint, validated=None, unigram=None, stopped="SIGTERM")
    assert "stopped by SIGTERM after 25 of 50 steps" in text and "the same command again" in text
    assert "perplexity 32.00" in text and "held-out rows at step 20" in text and "unigram     perplexity 90.00" in text
    assert "best" not in text


def test_a_run_without_likelihood_reports_its_cross_entropy_and_no_perplexity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = recipe(tmp_path, steps=20)
    reporter = Reporter(asked, LAYOUT, tmp_path, first_step=0)
    for step, value in ((10, 3.0), (20, 3.5)):
        train(reporter, step, 4.0)
        reporter.validation(step=step, results={4: CrossEntropy(value, 0.01, 32)}, seconds=0.0, unigram_perplexity=90.0)
    reporter.close()
    assert "step 10: validation cross-entropy 3.0000 +- 0.0100 (no likelihood)" in caplog.text
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "validation"]
    assert [line["cross_entropy"] for line in lines] == [3.0, 3.5]
    assert not any({"nelbo", "perplexity", "unigram_perplexity"} & line.keys() for line in lines)
    assert sorted(picture.name for picture in (tmp_path / "report").glob("*.png")) == ["cross_entropy.png", "loss.png", "throughput.png"]
    checkpoint = tmp_path / "checkpoints" / "step_00000020"
    for known in (CrossEntropy(3.5, 0.01, 32), None):
        text = summary(asked, step=20, checkpoint=checkpoint, validated=known, unigram=90.0, stopped=None)
        assert "validation  cross-entropy 3.5000 +- 0.0100 nats per data token (no likelihood) on 32 held-out rows\n" in text
        assert "best        cross-entropy 3.0000" in text and "perplexity" not in text and "unigram" not in text


def test_share_of_masked_positions_is_that_of_the_schedule() -> None:
    assert expected_masked("linear", TimeDensity((0.3, 0.8))) == pytest.approx(0.55, rel=1e-12)
    assert expected_masked("square", TimeDensity((0.0, 1.0))) == pytest.approx(1 / 3, abs=1e-6)
    assert expected_masked("linear", TimeDensity((1.0, 1.0))) == 1.0


def test_flops_follow_the_objective_and_not_the_recomputation(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    bd3 = AttentionPattern("block_diffusion", asked.model.context, 8)
    causal = AttentionPattern("causal", asked.model.context, 1)
    sections = asked.model, asked.objective
    plain = flops_per_token(*sections, bd3, 50258)
    assert plain == pytest.approx(training_flops_per_token(asked.model, bd3, 50258, 0.5005))
    low, high = (TunerState(8, interval) for interval in ((0.3, 0.4), (0.9, 1.0)))
    assert flops_per_token(*sections, bd3, 50258, low) < plain < flops_per_token(*sections, bd3, 50258, high)
    learned = TunerState(8, (0.001, 1.0), density=(2, 1))  # more of the bin of little noise
    assert flops_per_token(*sections, bd3, 50258, learned) < plain
    assert flops_per_token(*sections, causal, 50258) == pytest.approx(training_flops_per_token(asked.model, causal, 50258, 1.0))
    asked.training.recompute = "layer"
    assert flops_per_token(*sections, bd3, 50258) == plain


def test_the_start_says_where_texts_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for special, said in (("bos_eos", 1), ("none", 0)):
        asked = recipe(tmp_path / special)
        asked.data.row_special = special
        Reporter(asked, LAYOUT, tmp_path / special, first_step=0).close()
        assert caplog.text.count("texts of this model end at 128 tokens") == said
        caplog.clear()


def test_a_mixture_of_block_sizes_has_one_line_with_all_of_them(tmp_path: Path) -> None:
    reporter = Reporter(recipe(tmp_path), LAYOUT, tmp_path, first_step=0)
    reporter.validation(step=10, results={4: validation(3.0), 32: validation(4.0)}, seconds=0.0, unigram_perplexity=None)
    reporter.close()
    (line,) = [one for one in read_metrics(tmp_path / "metrics.jsonl") if one["kind"] == "validation"]
    assert line["nelbo"] == 3.0 and {size: one["nelbo"] for size, one in line["block_sizes"].items()} == {"4": 3.0, "32": 4.0}


def test_every_validation_set_has_its_line_plot_and_key_of_wandb(tmp_path: Path) -> None:
    of_run = recipe(tmp_path)
    reporter = Reporter(of_run, LAYOUT, tmp_path, first_step=0)
    for step in (10, 20):
        sets = {"books": {4: validation(3.0)}, "0012": {4: validation(2.0)}}
        reporter.validation(step=step, results={4: validation(6.0)}, seconds=0.0, unigram_perplexity=90.0, sets=sets)
    reporter.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["nelbo"] for line in lines if line["kind"] == "validation/books"] == [3.0, 3.0]
    assert [line["nelbo"] for line in lines if line["kind"] == "validation"] == [6.0, 6.0]
    assert numbers(next(line for line in lines if line["kind"] == "validation/0012"))["validation/0012/nelbo"] == 2.0
    drawn = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"perplexity.png", "perplexity_books.png", "perplexity_0012.png"} <= drawn
