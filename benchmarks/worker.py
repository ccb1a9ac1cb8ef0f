"""The measured process: `python -m compress.benchmarks.worker` holds one model and runs it when it is told to.

It reads one JSON object a line from stdin and answers with one on stdout; while it waits it computes nothing.
{"do": "load", "folder", "runtime", "threads", "cpus"} → {"kind", "load_ms", "peak_rss_mb", …}
{"do": "measure", "tokens", "batch", "new_tokens", "chunk", "vocab_size"} → {"times": {"ttft_ms": […]}, "peak_rss_mb"}
Only this process's memory counts: it imports numpy and the runtime, no tokenizer and no torch.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressError
from compress.hardware import PeakMemory

if TYPE_CHECKING:
    from compress.runtime.session import OnnxModel

Ints = NDArray[np.int64]
Times = dict[str, list[float]]

_ENCODER_REPEATS = 5


class Subject(Protocol):
    """A loaded model. `measure` runs one prompt (B, T) and returns the times in ms, by figure.

    chunk: tokens of the prompt that are read in one call; 0: as the folder says.
    """

    kind: str

    def measure(self, prompt_BT: Ints, num_new: int, chunk: int = 0) -> Times: ...


class OrtDecoder:
    """A decoder in bare ONNX Runtime: greedy, one key/value buffer for the whole generation where the graph allows."""

    kind = "decoder"

    def __init__(self, model: OnnxModel) -> None:
        self._model = model

    def measure(self, prompt_BT: Ints, num_new: int, chunk: int = 0) -> Times:
        """`ttft_ms`: the prompt to its first token. `tpot_ms`: each of the next `num_new` tokens."""
        decoder = self._model.decoder(prompt_BT.shape[1] + num_new, prompt_BT.shape[0])
        ttft_ms, token_B = _timed(lambda: decoder.prefill(prompt_BT, chunk).argmax(-1))
        tpot_ms = []
        for _ in range(num_new):
            step_ms, token_B = _timed(lambda: decoder.step(token_B).argmax(-1))  # noqa: B023  (called at once)
            tpot_ms.append(step_ms)
        return {"ttft_ms": [ttft_ms], "tpot_ms": tpot_ms}


class OrtEncoder:
    """An encoder in bare ONNX Runtime."""

    kind = "encoder"

    def __init__(self, model: OnnxModel) -> None:
        self._model = model

    def measure(self, prompt_BT: Ints, num_new: int, chunk: int = 0) -> Times:
        """`latency_ms`: the whole forward pass, several times."""
        return {"latency_ms": [_timed(lambda: self._model.encode(prompt_BT))[0] for _ in range(_ENCODER_REPEATS)]}


class GenaiDecoder:
    """A decoder in onnxruntime-genai, whose thread count is in the folder's `genai_config.json`."""

    kind = "decoder"

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))

    def measure(self, prompt_BT: Ints, num_new: int, chunk: int = 0) -> Times:
        """As OrtDecoder's. The end token is held back, so that every model makes as many tokens."""
        batch_size, length = prompt_BT.shape
        total = length + num_new + 1
        params = self._genai.GeneratorParams(self._model)
        chunks = {"chunk_size": chunk} if chunk else {}
        if batch_size > 1:
            chunks["chunk_size"] = 0  # onnxruntime-genai reads no batch in chunks
        lengths = {"max_length": total, "min_length": total}
        params.set_search_options(batch_size=batch_size, do_sample=False, **lengths, **chunks)
        generator = self._genai.Generator(self._model, params)

        def first() -> None:
            generator.append_tokens(prompt_BT.astype(np.int32))
            generator.generate_next_token()

        ttft_ms = _timed(first)[0]
        return {
            "ttft_ms": [ttft_ms],
            "tpot_ms": [_timed(generator.generate_next_token)[0] for _ in range(num_new)],
        }


def load(folder: Path, runtime: str, threads: int) -> Subject:
    """The model in `folder` in `ort` or `genai`. Raises CompressError for a folder that can't be opened."""
    if runtime == "genai":
        return GenaiDecoder(folder)
    from compress.runtime.session import OnnxModel

    model = OnnxModel(folder, threads=threads, alone=True)
    return OrtDecoder(model) if model.is_decoder else OrtEncoder(model)


def serve(commands: Iterator[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Obey one command after the other. A CompressError is answered; anything else ends the process, with traceback."""
    memory = PeakMemory()
    subject: Subject | None = None
    for line in commands:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                pinned = _pin(command["cpus"])
                before_mb = memory.peak_mb()
                folder = Path(command["folder"])
                load_ms, subject = _timed(lambda: load(folder, command["runtime"], command["threads"]))  # noqa: B023  (called at once)
                reply: dict[str, Any] = {"kind": subject.kind, "load_ms": load_ms, "pinned": pinned}
                reply["rss_before_load_mb"] = before_mb
            else:
                assert subject is not None
                reply = {"times": subject.measure(_prompt(command), command["new_tokens"], command["chunk"])}
            answer(reply | {"peak_rss_mb": memory.peak_mb()})
        except CompressError as error:
            answer({"error": vars(error.problem)})


def commands() -> Iterator[str]:
    """The lines of stdin. Where it ends, who asks is gone, killed perhaps: so is this process, whatever it computes."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in iter(sys.stdin.readline, ""):
            lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()  # waits for its turn in `read`, and takes no time
    while True:
        yield lines.get()


def _prompt(command: dict[str, Any]) -> Ints:
    """The same made-up tokens for every model: the time of a dense model does not depend on which they are."""
    shape = command["batch"], command["tokens"]
    return np.random.default_rng(0).integers(1, command["vocab_size"], shape, dtype=np.int64)


def _pin(cpus: list[int]) -> bool:
    """Keep this process, and the threads it will start, on `cpus`; False where the system has no way to."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, cpus)
    return True


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter_ns()
    result = work()
    return (perf_counter_ns() - start) / 1e6, result


def main() -> None:
    """Keep stdout for the answers: what libraries print there goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(reply: dict[str, Any]) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    serve(commands(), answer)


if __name__ == "__main__":
    main()
