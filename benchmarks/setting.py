"""What a benchmark runs on: a device, a precision and a model of a named size; clocks, and the table it leaves.

    python benchmarks/foundation.py --shape 8b --device cuda --dtype bfloat16 --out out/h100

`135m` is the real demo model. The other shapes have random weights, so nothing is downloaded: what a pass costs does
not depend on them, what it computes is compared all the same. `--tokenizer` is a folder with any chat tokenizer; the
demo model's is the default. With `--out` the table is written as JSON and Markdown too.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from piggyback_lens import LoadSettings, LoRASettings, add_lora, default_model, load_causal_lm, load_tokenizer

SHAPES = {
    "135m": None,
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""None is the demo model; the others are those of Llama 3.x, and one for the tests."""
EXPLAINED = 0.8
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def arguments_of(description):
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokenizer", help="folder of a chat tokenizer; default the demo model's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--profile", action="store_true", help="note where the time of our side goes")
    parser.add_argument("--out", type=Path, help="folder for the table as JSON and Markdown")
    return parser


@dataclass
class Setting:
    """Models and clocks of one run.

    Attributes:
        tolerance: how far numbers that should be equal may differ, as a part of their size.
        rows: the table so far.
        spent: work to where its time goes.
    """

    shape: str
    device: str
    dtype: torch.dtype
    source: str
    threads: int
    repeats: int
    clock: str
    profile: bool
    out: Path | None
    rows: list = field(default_factory=list)
    spent: dict = field(default_factory=dict)

    @classmethod
    def of(cls, arguments):
        """As the command line says."""
        torch.set_num_threads(arguments.threads)
        dtype = getattr(torch, arguments.dtype)
        source = arguments.tokenizer or default_model()
        names = ("shape", "device", "threads", "repeats", "clock", "profile", "out")
        return cls(dtype=dtype, source=source, **{name: getattr(arguments, name) for name in names})

    @property
    def real(self):
        """Whether the model speaks."""
        return SHAPES[self.shape] is None

    @property
    def exact(self):
        """Whether equal work gives equal numbers to 1e-4."""
        return self.dtype == torch.float32 and self.device == "cpu"

    @property
    def tolerance(self):
        """How far two ways to the same number may be apart, as a part of it."""
        return 1e-4 if self.exact else 1e-3 if self.dtype == torch.float32 else 0.06

    def tokenizer(self):
        """The tokenizer."""
        return load_tokenizer(self.source, settings=LoadSettings(offline=True))

    def model(self):
        """A fresh copy of the model."""
        if self.real:
            return load_causal_lm(
                self.source, settings=LoadSettings(offline=True, device=self.device, dtype=self.dtype)
            )
        from transformers import AutoModelForCausalLM, LlamaConfig

        sizes = {"max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False}
        config = LlamaConfig(**SHAPES[self.shape], **sizes)
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    def adapted(self, scale=0.02):
        """The model with a LoRA adapter on all linear layers that is not the identity."""
        model = add_lora(self.model(), LoRASettings(rank=8 if self.real else 16))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * scale
                parameter.data = drawn.to(parameter.device, parameter.dtype)
        return model

    def seconds(self, function):
        """Seconds of one call, all work on the device included."""
        clock = CLOCKS[self.clock]
        self._wait()
        start = clock()
        function()
        self._wait()
        return clock() - start

    def in_turns(self, theirs, ours, repeats=None):
        """Median seconds of both, timed in turns so that a machine that slows down slows both, and their ratio."""
        theirs(), ours()  # warm-up
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
        times = [(self.seconds(theirs), self.seconds(ours)) for _ in range(repeats or self.repeats)]
        a, b = (statistics.median(side) for side in zip(*times, strict=True))
        return a, b, statistics.median(x / y for x, y in times)

    def add(self, work, peer, theirs, ours, ratio=None, **more):
        """One row of the table, printed as it comes."""
        ratio = theirs / ours if ratio is None else ratio
        row = {"work": work, "peer": peer, "peer_s": theirs, "ours_s": ours, "ratio": ratio, **more}
        if self.device != "cpu":
            row["peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.rows.append(row)
        print(line(row), flush=True)

    def begin(self, name, *more):
        """Print what runs, and the head of the table."""
        self.name = name
        self.facts = {
            "benchmark": name, "shape": self.shape, "dtype": str(self.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device != "cpu" else f"{self.threads} threads",
            "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            **{package: version(package) for package in ("torch", "transformers", "peft", "transformer-lens")},
        }  # fmt: skip
        facts = [f"{name} {value}" for name, value in self.facts.items()]
        print(", ".join([*facts, f"medians of {self.repeats}", *more]) + "\n")
        print(HEAD, flush=True)

    def end(self):
        """Write the table, if there is a folder for it."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            rows = {"facts": self.facts, "rows": self.rows, "spent": self.spent}
            (self.out / f"{self.name}.json").write_text(json.dumps(rows, indent=1) + "\n")
            (self.out / f"{self.name}.md").write_text("\n".join([HEAD, *map(line, self.rows), ""]))

    def assert_close(self, found, expected, what):
        """Numbers that should be equal, by the length of their difference."""
        found, expected = (torch.as_tensor(x).detach().float().flatten().cpu() for x in (found, expected))
        apart = float((found - expected).norm() / expected.norm())
        assert math.isfinite(apart), f"{what}: not finite"
        assert apart <= self.tolerance, f"{what}: {apart:.2g} of their length apart"

    def assert_answers(self, found, expected):
        """Equal answers. Where rounding decides between likely tokens only the first tokens are compared."""
        pairs = [(tuple(a), tuple(b)) for a, b in zip(found, expected, strict=True)]
        if self.exact:
            same = sum(a == b for a, b in pairs)
            assert same >= len(pairs) - 1, f"{same} of {len(pairs)} answers equal"
        else:
            same = sum(a[0] == b[0] for a, b in pairs)
            assert same >= 0.75 * len(pairs), f"{same} of {len(pairs)} first tokens equal"

    def _wait(self):
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def explain(self, work, function):
        """With --profile: where the time of a piece of work goes, its largest parts until they are EXPLAINED of it.

        On a GPU the parts are its kernels, and the time in which it waits for the next; on a CPU operations without
        those inside them, and the time between operations.
        """
        if not self.profile:
            return
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        cuda, clock = self.device != "cpu", CLOCKS[self.clock]
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as found:
            self._wait()
            start = clock()
            function()
            self._wait()
            whole = 1e6 * (clock() - start)
        events = [event for event in found.key_averages() if (event.device_type == DeviceType.CPU) != cuda]
        parts = {e.key[:60]: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
        rest = whole - sum(parts.values())
        parts["waiting for the next kernel" if cuda else "between operations"] = max(rest, 0.0)
        whole, said = sum(parts.values()), {}
        for name, micros in sorted(parts.items(), key=lambda part: -part[1]):
            if sum(said.values()) < EXPLAINED:
                said[name] = round(micros / whole, 3)
        self.spent[work] = said
        print(f"{work}: {told(said)}", flush=True)


def told(said):
    """Parts of a time, in words."""
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in said.items())


HEAD = "| work | peer | peer, s | ours, s | ratio | more |\n|---|---|---|---|---|---|"


def line(row):
    more = ", ".join(f"{name} {_short(value)}" for name, value in row.items() if name not in _COLUMNS)
    return "| {work} | {peer} | {peer_s:.3f} | {ours_s:.3f} | {ratio:.2f} | ".format(**row) + more + " |"


_COLUMNS = {"work", "peer", "peer_s", "ours_s", "ratio"}


def _short(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)
