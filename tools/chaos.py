"""Disturb a training again and again and show that nothing of it is lost, repeated or changed.

    python tools/chaos.py recipes/quickstart.yaml --rounds 20 --signal KILL training.steps=48 checkpoint.every=6 ...

An undisturbed run on one process is the reference. Every round starts the same run (same folder, same command) on a random number of
ranks in a random layout, waits for a random moment (in start-up, a step, a save, a validation, a tuning) and sends the signal; a run
that comes to its end in spite of it is compared with the reference and the next one begun; the last one is let finish. KILL goes to all
processes at once or to one rank, whose name the others must say while they end; TERM goes to every rank, as `srun` sends it, and each must
leave with 0 within 30 s and leave a whole checkpoint of the one step after which all stopped.

--second: in half of the rounds a second job of one process is submitted into the same folder at a random moment. It must be refused while
the first lives; where the first has died or left, it must take over and finish the run. --amend: at half of its steps every run, the
reference too, is continued with `run.amend` of some keys, drawn by the seed.

Ranks are started without torchrun (it would answer for them) through the hidden subcommand `rank`, which writes down, per process, what
the loader handed out and which noise it got; the product has no hook for this. Compared are all lines of metrics.jsonl (1e-5 relative),
every (step, slot) that was ever trained, and that the surviving attempts trained every slot of every step exactly once.
Writes DATE-chaos-{kill,term}.{md,json} to --out; exit status 0 where all was as it must be, else 1.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from chaos_job import MOMENTS, REFUSED, ROOT, Job, Second, Watch
from chaos_trace import Trace, compare_metrics, compare_samples, rank_main

from bd3_scale.program import run_program

FIXED = ("run.device=cpu", "tracking.every=1", "tracking.wandb=disabled", "tracking.progress=false", "tracking.sample_tokens=0",
         "tracking.plots=false", "parallel.timeout=120")  # fmt: skip
TERM_LIMIT = 30.0
"""Seconds that a cluster gives a job between SIGTERM and SIGKILL."""
GUARD_LIMIT = 60.0
AMENDMENTS = {
    "training.learning_rate": ("1e-3", "3e-4"),
    "training.clip": ("0.3", "2.0"),
    "training.weight_decay": ("0.1",),
    "run.seed": ("11", "12"),
    "data.skip": ("[[{0},{1}]]",),
}
"""What --amend draws from; {0} and {1} are samples a few steps after the change."""
RUN_LIMIT = 900.0


@dataclass
class Round:
    run: int
    ranks: int
    layout: str
    resumed_at: int
    moment: str = "end"
    """What the signal met; `end`: no signal was sent."""
    step: int = 0
    to: str = ""
    statuses: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    checkpoint: int | None = None
    """The step of `latest` afterwards."""
    second: str = ""
    """What became of a second job in the same folder: refused | took over | came first."""
    problems: list[str] = field(default_factory=list)


class Chaos:
    def __init__(self, options: argparse.Namespace) -> None:
        from bd3_scale import recipe as recipes
        from bd3_scale.rules.validate import validate
        from bd3_scale.tuning import interval_tuner

        self.options, self.overrides = options, [*FIXED, *options.overrides]
        self.random, self.signal = random.Random(options.seed), signal.Signals[f"SIG{options.signal}"]
        self.recipe = recipe = recipes.load(options.recipe, self.overrides)
        validate(recipe, 1, "cpu")
        if not isinstance(recipe.training.global_batch, int):
            raise SystemExit("chaos: training.global_batch must be one number here; set training.global_batch=16, for example")
        self.steps, self.batch = recipe.total_steps, recipe.training.global_batch
        self.phases: list[tuple[int, list[str]]] = [(self.steps, [])]
        """Steps at the end of each part of a run, and its overrides."""
        if options.amend:
            half, draw = self.steps // 2, self.random.choice
            chosen = sorted(self.random.sample(sorted(AMENDMENTS), 3))
            amended = [f"{key}={draw(AMENDMENTS[key]).format(self.batch * (half + 2), self.batch * (half + 3))}" for key in chosen]
            self.phases = [(half, [f"training.steps={half}"]), (self.steps, [*amended, f"run.amend=[{','.join(chosen)}]"])]
            validate(recipes.load(options.recipe, [*self.overrides, *amended]), 1, "cpu")
        every = recipe.validation.every
        self.tuner_due = {step for step in range(1, self.steps + 1) if interval_tuner.due(recipe.tuner, step)}
        self.validation_due = {step for step in range(1, self.steps) if every and step % every == 0} | self.tuner_due
        self.validation_due |= {end for end, _ in self.phases}
        self.folder = options.work / f"{options.signal.lower()}-{options.seed}"
        self.rounds: list[Round] = []
        self.worst: dict[str, float] = {}
        self.problems: list[str] = []
        self.met: Counter[str] = Counter()
        self.start_up: list[float] = []
        self.runs, self.slots, self.attempts = 0, 0, 0

    def command(self, run: Path, phase: int, layout: Sequence[str] = ()) -> list[str]:
        return [str(self.options.recipe), *self.overrides, *self.phases[phase][1], f"run.dir={run}", *layout]

    def reference(self) -> None:
        """Make the undisturbed run, or take the one that is there, if sources and recipe are the same."""
        from bd3_scale import recipe as recipes

        sources = sorted((ROOT / "bd3_scale").rglob("*.py"))
        asked = recipes.to_yaml(self.recipe) + repr(self.phases)
        mark = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + asked.encode()).hexdigest()
        folder = self.options.work / "reference"
        if not (folder / "mark").exists() or (folder / "mark").read_text() != mark:
            shutil.rmtree(folder, ignore_errors=True)
            for phase in range(len(self.phases)):
                job = Job(1, self.command(folder / "run", phase), folder / f"trace-{phase}")
                try:
                    statuses, _ = job.wait(RUN_LIMIT)
                finally:
                    job.end()
                if statuses != [0]:
                    raise SystemExit(f"chaos: the undisturbed run ended with status {statuses[0]}:\n{job.log.read_text()[-3000:]}")
            (folder / "mark").write_text(mark)
        self.metrics = folder / "run" / "metrics.jsonl"
        self.trace = Trace.read([folder / f"trace-{phase}" / "rank-0.jsonl" for phase in range(len(self.phases))], self.batch)
        problems = compare_samples(self.trace, [(self.trace, 1)], self.batch, self.steps)
        assert not problems and all(len(values) == 1 for seen in self.trace.seen.values() for values in seen.values()), problems
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        seconds = {(line["kind"], line["step"]): line["seconds"] for line in lines}
        train = [line["seconds"] for line in lines if line["kind"] == "train"]
        validations = [value - seconds["train", step] for (kind, step), value in seconds.items() if kind == "validation"]
        step = statistics.median(b - a for a, b in pairwise(train))
        self.lasts = {"step": step, "save": 0.01, "validation": statistics.median(validations), "tuning": statistics.median(validations)}
        """Seconds that a moment takes, about."""

    def layout(self) -> tuple[int, int, list[str]]:
        """A random number of ranks, how many share a replica, and a layout that the recipe works with."""
        from bd3_scale import recipe as recipes
        from bd3_scale.errors import RecipeError
        from bd3_scale.rules.validate import validate

        draw = self.random.choice
        while True:
            ranks, tensor, pipeline, zero = draw(self.options.ranks), draw((1, 1, 2, 4)), draw((1, 1, 2, 4)), draw((0, 1, 2, 3))
            keys: dict[str, Any] = {
                "tensor": tensor,
                "pipeline": pipeline,
                "zero": zero,
                "virtual_stages": draw((1, 2)) if pipeline > 1 else 1,
            }
            keys |= {"sequence": draw(("true", "false")) if tensor > 1 else "false", "micro_batch": draw(("null", 1, 2, 4))}
            chosen = [f"parallel.{name}={value}" for name, value in keys.items()]
            try:
                validate(recipes.load(self.options.recipe, [*self.overrides, *chosen]), ranks, "cpu")
            except RecipeError:
                continue
            return ranks, tensor * pipeline, chosen

    def all_rounds(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        sent = 0
        while sent < self.options.rounds or self.rounds[-1].moment != "end":
            run = self.folder / f"run-{self.runs}"
            attempts: list[tuple[Trace, int]] = []
            phase = 0
            while phase < len(self.phases):
                one, traces = self.attempt(run, phase, disturbed=sent < self.options.rounds)
                attempts += traces
                self.rounds.append(one)
                phase += one.moment == "end" or one.second in ("took over", "came first")
                sent += one.moment != "end"
                if one.moment != "end":
                    self.met[one.moment] += 1
                words = f"round {sent}/{self.options.rounds}: {one.moment} of step {one.step} on {one.ranks} ranks ({one.layout}), "
                words += f"resumed at {one.resumed_at}, {one.to or 'undisturbed'}, statuses {one.statuses}, {one.seconds:.1f} s"
                words += f", the second job {one.second}" if one.second else ""
                print(words + "".join(f"\n  PROBLEM: {problem}" for problem in one.problems), file=sys.stderr, flush=True)
                if one.problems and one.moment == "end":
                    return  # a run that cannot be finished cannot be compared
            worst, problems = compare_metrics(self.metrics, run / "metrics.jsonl")
            self.worst = {name: max(value, self.worst.get(name, 0.0)) for name, value in worst.items()}
            self.problems += problems + compare_samples(self.trace, attempts, self.batch, self.steps)
            self.slots += sum(len(trace.seen["noise"]) for trace, _ in attempts)
            self.runs += 1

    def attempt(self, run: Path, phase: int, disturbed: bool) -> tuple[Round, list[tuple[Trace, int]]]:
        """Start or continue the run, disturb it at a random moment, and look at what is left. Returns what each job that trained wrote
        down, and how many ranks share a replica."""
        ranks, peers, layout = self.layout()
        first, self.attempts = latest_step(run) or 0, self.attempts + 1
        one = Round(self.runs, ranks, ", ".join(key.removeprefix("parallel.") for key in layout), first)
        watch = Watch(run, self.validation_due, self.tuner_due)
        folder = self.folder / f"attempt-{self.attempts}"
        second = None
        if disturbed and self.options.second and self.random.random() < 0.5:
            second = Second(self.command(run, phase), folder / "second", self.random.uniform(0, 3))
        job = Job(ranks, self.command(run, phase, layout), folder / "first")
        try:
            meets = disturbed and self.wait_for_moment(job, watch, first, self.phases[phase][0])
            if meets:
                one.moment, one.step = watch.now()
                victim = None
                if self.signal == signal.SIGKILL and ranks > 1 and one.moment != "start-up" and self.random.random() < 0.5:
                    victim = self.random.randrange(ranks)
                one.to = f"{self.signal.name} to " + ("all ranks" if victim is None else f"rank {victim}")
                job.send(self.signal, victim)
                limit = TERM_LIMIT if self.signal == signal.SIGTERM else GUARD_LIMIT
            one.statuses, one.seconds = job.wait(limit if meets else RUN_LIMIT)
        finally:
            job.end()
        trace = Trace.read(job.traces, self.batch)
        traces = [(trace, peers)]
        if second is not None:
            self.judge_second(one, job, second)
            if second.job is not None:
                traces.append((Trace.read(second.job.traces, self.batch), 1))
        self.judge(one, run, job, trace, self.phases[phase][0])
        return one, traces

    def judge_second(self, one: Round, job: Job, second: Second) -> None:
        """Of two jobs in one folder one trains at a time, and none is refused by one that does not live."""
        outcome, status = second.outcome()
        first_refused = REFUSED in job.log.read_text(errors="replace")
        one.second = {"refused": "refused", "trained": "came first" if first_refused else "took over"}.get(outcome, "")
        if status != {"refused": 2, "trained": 0}.get(outcome, 0) or (first_refused and outcome != "trained"):
            assert second.job is not None
            text = second.job.log.read_text(errors="replace")[-1000:]
            one.problems.append(f"the second job was {outcome} with status {status}, the first refused: {first_refused}; {text}")

    def wait_for_moment(self, job: Job, watch: Watch, first: int, steps: int) -> bool:
        """Sleep until the moment that was met the least often, at a random step; False where the job ended before.

        Every other step beyond the end is that: otherwise a run that is near its end would be disturbed there until no round is left.
        """
        choice = self.random.random
        fewest = min(self.met[kind] for kind in self.kinds)
        kind = self.random.choice([kind for kind in self.kinds if self.met[kind] == fewest])
        reach = max(2 * self.recipe.checkpoint.every, self.steps // 8)
        target = first + self.random.randint(1, reach)
        if target > steps and choice() < 0.5:
            return False
        target = min(steps, target)
        start = time.monotonic()
        while not all(trace.exists() for trace in job.traces):  # until the product's own code runs in all ranks
            if job.ended or time.monotonic() - start > RUN_LIMIT:
                return False
            time.sleep(0.002)
        if kind == "start-up":
            time.sleep(choice() * (statistics.median(self.start_up) if self.start_up else 3.0))
            return not job.ended
        start, began = time.monotonic(), False
        while not job.ended and time.monotonic() - start < RUN_LIMIT:
            moment, step = watch.now()
            if moment != "start-up" and not began:
                began = True
                self.start_up.append(time.monotonic() - start)
            if began and step >= target and (moment == kind or step >= min(steps, target + reach)):
                time.sleep(choice() * self.lasts.get(kind, 0.0) * 0.8)
                return not job.ended
            time.sleep(0.001)
        return False

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in MOMENTS if kind != "tuning" or self.tuner_due]

    def judge(self, one: Round, run: Path, job: Job, trace: Trace, steps: int) -> None:
        """Whether the ranks left as they must and what they left is whole."""
        output = job.log.read_text(errors="replace")
        try:
            one.checkpoint = latest_step(run, verify=True)
        except Exception as error:  # of any kind: that is what is asked here
            one.problems.append(f"no checkpoint to continue from: {error}")
            return
        if (one.checkpoint or 0) < one.resumed_at:
            one.problems.append(f"`latest` went back from {one.resumed_at} to {one.checkpoint}")
        if trace.first is not None and trace.first != one.resumed_at:
            one.problems.append(f"continued with step {trace.first} from the checkpoint of step {one.resumed_at}")
        statuses = set(one.statuses)
        if one.second in ("took over", "came first"):
            if one.checkpoint != steps:
                one.problems.append(f"the second job {one.second} and left a checkpoint of step {one.checkpoint}")
        elif one.moment == "end" and (statuses != {0} or one.checkpoint != steps):
            one.problems.append(f"ended by itself with {one.statuses} and a checkpoint of step {one.checkpoint}")
        elif one.to == "SIGKILL to all ranks" and statuses != {-signal.SIGKILL}:
            one.problems.append(f"statuses {one.statuses}")
        elif one.to.startswith("SIGKILL to rank"):
            victim = int(one.to.split()[-1])
            others = [status for rank, status in enumerate(one.statuses) if rank != victim]
            errors = [line for line in output.splitlines() if "bd3_scale: error:" in line]
            if any(status in (0, None) for status in others) or not any(f"rank {victim} (" in line for line in errors):
                one.problems.append(f"the others left with {others} and say {errors}")
        elif one.to.startswith("SIGTERM"):
            if statuses != {0}:
                one.problems.append(f"statuses {one.statuses} (None: not within {TERM_LIMIT:g} s)")
            agreed = {last + 1 for last in trace.last} - {0} or {one.resumed_at}
            if agreed != {one.checkpoint or 0} or (-1 in trace.last and agreed != {one.resumed_at}):
                one.problems.append(f"the ranks stopped after the steps {trace.last} (+ 1), the checkpoint is of step {one.checkpoint}")
        if one.problems:
            one.problems.append("log: " + " | ".join(line for line in output.splitlines()[-12:] if line.strip())[-1500:])


def latest_step(run: Path, verify: bool = False) -> int | None:
    from bd3_scale.checkpoint.store import Checkpoint, find_latest

    path = find_latest(run / "checkpoints") if (run / "checkpoints").exists() else None
    if path is None:
        return None
    checkpoint = Checkpoint(path)
    if verify:
        checkpoint.verify_files()
    return checkpoint.step


# -- Report ----------------------------------------------------------------------------------------------------------------


def report(chaos: Chaos, arguments: Sequence[str]) -> dict[str, Any]:
    sent = [one for one in chaos.rounds if one.moment != "end"]
    problems = [f"round {number}: {text}" for number, one in enumerate(chaos.rounds) for text in one.problems] + chaos.problems
    if len(sent) != chaos.options.rounds or chaos.rounds[-1].moment != "end":
        problems.append(f"{len(sent)} of {chaos.options.rounds} rounds, the last run {chaos.rounds[-1].moment}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "command": shlex.join(["python", "tools/chaos.py", *arguments]),
        "verdict": "failed" if problems else "passed",
        "problems": problems,
        "as_they_must": f"{sum(not one.problems for one in sent)} of {chaos.options.rounds}",
        "moments": dict(chaos.met),
        "second_jobs": dict(Counter(one.second for one in chaos.rounds if one.second)),
        "amended": [phase[1] for phase in chaos.phases[1:]],
        "runs_compared": chaos.runs,
        "seconds_until_all_had_left": {"median": statistics.median(one.seconds for one in sent), "most": max(one.seconds for one in sent)},
        "slots_compared": chaos.slots,
        "worst_relative_difference": chaos.worst,
        "rounds": [asdict(one) for one in chaos.rounds],
    }


def write(result: dict[str, Any], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [f"# {stem.name}", "", f"Commit {result['commit']}; `{result['command']}`", "", f"Verdict: **{result['verdict']}**.", ""]
    lines += [f"- {problem}" for problem in result["problems"]] + ["", "| what | value |", "|---|---|"]
    told = ("as_they_must", "moments", "second_jobs", "amended", "runs_compared", "seconds_until_all_had_left", "slots_compared")
    for key in (*told, "worst_relative_difference"):
        value = result[key]
        text = "; ".join(f"{k}: {v:.3g}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"| {key.replace('_', ' ')} | {text} |")
    names = ("run", "resumed at", "ranks", "layout", "moment", "step", "signal", "statuses", "s", "second job", "`latest`")
    lines += ["", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for one in result["rounds"]:
        cells = [one["run"], one["resumed_at"], one["ranks"], one["layout"], one["moment"], one["step"] or "", one["to"], one["statuses"]]
        cells += [f"{one['seconds']:.1f}", one["second"], one["checkpoint"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["rank"]:
        return rank_main(Path(arguments[1]), arguments[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--second", action="store_true", help="submit second jobs into the same folder")
    parser.add_argument("--amend", action="store_true", help="change some keys at half of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"), help="the reference is kept and used again there")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    options = parser.parse_intermixed_args(arguments)
    options.work, options.recipe = options.work.resolve(), options.recipe.resolve()
    sys.path.insert(0, str(ROOT))
    chaos = Chaos(options)
    chaos.reference()
    chaos.all_rounds()
    result = report(chaos, arguments)
    stem = options.out / f"{result['date']}-chaos-{options.signal.lower()}"
    write(result, stem)
    print(f"{result['verdict']}: {result['as_they_must']} rounds; worst {max(chaos.worst.values(), default=math.nan):.1e}; {stem}.md")
    for problem in result["problems"]:
        print(f"  {problem}")
    return 0 if result["verdict"] == "passed" else 1


if __name__ == "__main__":
    run_program(main)
