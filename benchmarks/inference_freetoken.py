"""FreeToken 0.1.3 as an arm of the inference benchmark, in a process of its own.

Its router's choices are replaced as everywhere; its cache, its copies and its graphs are its own. A round is one
request: a short prompt, tokens that warm the cache, since its prefill takes the slots, and the tokens that are timed.

The process is ``python -m benchmarks.inference_freetoken FOLDER TRACE SLOTS STRATEGY FETCH``; a line "first warm timed"
on its input starts a round, whose seconds it prints.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_ANSWER = "@freetoken "
_PROMPT = 8


class FreeTokenError(RuntimeError):
    """It could not be started, or ended."""


class FreeToken:
    """The arm.

    Args:
        wheels: folder in which its wheels are unpacked.
        strategy: ``offload`` fetches every miss, ``hybrid`` has the CPU compute those beyond ``fetch`` of a call.
    """

    note = "one request a round; the last tokens' times"

    def __init__(
        self, name: str, wheels: str, folder: Path, trace_NLK: np.ndarray, slots: int, strategy: str, fetch: int = -1
    ) -> None:
        self.name, self.most, self._first, self._warm = name, None, 0, 64
        self._log = tempfile.TemporaryFile("a+")  # noqa: SIM115
        trace = folder / "trace.npy"
        np.save(trace, trace_NLK)
        command = [sys.executable, "-m", "benchmarks.inference_freetoken", str(folder), str(trace), str(slots)]
        path = os.pathsep.join([str(Path(__file__).parents[1]), wheels, os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [*command, strategy, str(fetch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            self._answer(80)
            self._rest()
        except BaseException:
            self.close()
            raise

    def warm(self, tokens: int) -> None:
        """Each round warms up by itself."""
        self._first = tokens

    def round(self, tokens: int) -> float:
        """Seconds of ``tokens`` tokens behind those that warm its cache."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        first = max(self._first - self._warm, 0)
        self._process.stdin.write(f"{first} {self._warm} {tokens}\n")
        self._process.stdin.flush()
        self._first += tokens
        seconds = float(self._answer(60))
        self._rest()
        return seconds

    def _rest(self) -> None:
        """Its threads look for work without sleeping: they must not take the cores from other arms."""
        self._process.send_signal(signal.SIGSTOP)

    def figures(self) -> dict[str, Any]:
        return {}

    def _answer(self, seconds: float) -> str:
        stuck = threading.Timer(seconds, self._process.kill)
        stuck.start()
        try:
            for line in self._process.stdout or ():
                if line.startswith(_ANSWER):
                    return line.removeprefix(_ANSWER).strip()
        finally:
            stuck.cancel()
        self._log.seek(0)
        raise FreeTokenError(f"ended or said nothing for {seconds:.0f} s: {self._log.read()[-1500:]}")

    def close(self) -> None:
        """It may lie stopped, with its GPU memory."""
        with self._process:  # closes its pipes and waits
            self._process.kill()
        self._log.close()


def _serve(folder: str, trace: str, slots: int, strategy: str, fetch: int) -> None:
    import torch

    routing = _force(np.load(trace))
    from freetoken.core import SamplingParams  # ty: ignore
    from freetoken.engine.config import EngineConfig  # ty: ignore
    from freetoken.llm import LLM  # ty: ignore

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    EngineConfig.distributed_addr = property(lambda _: address)  # its fixed port would be one for all arms
    llm = LLM(
        folder,
        moe_strategy=strategy,
        moe_cache_size=slots,
        moe_hybrid_max_fetch=fetch,
        cuda_graph_bs=[1],
        max_running_req=1,
        num_token_override=4096,
        max_seq_len_override=1024,
        moe_prefill_overlap=False,
    )
    times: list[float] = []
    sent = llm.send_result

    def timed(reply: Any) -> None:
        times.append(time.perf_counter())
        sent(reply)

    llm.send_result = timed
    prompt = list(range(5, 5 + _PROMPT))
    print(f"{_ANSWER}ready", flush=True)
    for line in sys.stdin:
        first, warm, tokens = map(int, line.split())
        times.clear()
        routing().start(first)
        llm.generate([prompt], SamplingParams(max_tokens=warm + tokens + 1, ignore_eos=True))
        torch.cuda.synchronize()
        ends = times[-tokens - 1 :]
        print(f"{_ANSWER}{ends[-1] - ends[0]}", flush=True)


def _force(trace_NLK: np.ndarray) -> Callable[[], Any]:
    """Replaces what the gates of decoded tokens chose. Returns what gives the routing, made at its first use: FreeToken
    wants to be the first to touch the GPU."""
    import torch
    from freetoken.layers import moe  # ty: ignore

    from benchmarks.inference_model import ForcedRouting

    @functools.cache
    def routing() -> ForcedRouting:
        return ForcedRouting(trace_NLK, torch.device("cuda"))

    def decode_forward(self: Any, hidden_states: Any, router_logits: Any = None) -> Any:
        weights, index = moe.fused_topk(
            hidden_states=hidden_states,
            gating_output=router_logits,
            topk=self.top_k,
            renormalize=self.renormalize,
        )
        if index.shape[0] == 1:
            index = routing().choices(self.layer_id).to(index.dtype, copy=True)  # it writes slots into them
        return self._decode_routed(hidden_states, weights, index)

    moe.OffloadMoELayer.decode_forward = decode_forward
    return routing


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
