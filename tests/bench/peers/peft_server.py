"""A minimal HTTP server for HF PEFT, which has none; runs in PEFT's own environment.

POST /generate {"prompt": [ids], "adapter": index or null, "tokens": n} returns one event,
{"output": [ids]}. Waiting requests with equally long prompts and outputs become one static batch,
which waits GATHER_SECONDS for further requests. Imports nothing of this repository.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

GATHER_SECONDS = 0.02
BASE = "__base__"
"""PEFT's name for a row without an adapter."""


@dataclass
class Job:
    """A request; `output` or `failure` is set before `done`."""

    prompt: list[int]
    adapter: int | None
    tokens: int
    output: list[int] = field(default_factory=list)
    failure: str = ""
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.prompt), self.tokens


class Batcher:
    """Runs the waiting requests in batches, on one thread."""

    def __init__(self, model: Any, slots: int) -> None:
        self._model, self._slots = model, slots
        self._waiting: queue.Queue[Job] = queue.Queue()

    def submit(self, job: Job) -> None:
        """Queues a job and waits until it is done."""
        self._waiting.put(job)
        job.done.wait()

    def run(self) -> None:
        """Runs batches forever."""
        next_job: Job | None = None
        while True:
            batch = [next_job or self._waiting.get()]
            next_job = None
            while len(batch) < self._slots and next_job is None:
                try:
                    job = self._waiting.get(timeout=GATHER_SECONDS)
                except queue.Empty:
                    break
                if job.shape == batch[0].shape:
                    batch.append(job)
                else:
                    next_job = job
            self._answer(batch)

    def _answer(self, batch: list[Job]) -> None:
        try:
            outputs = self._generate(batch)
        except Exception as error:
            for job in batch:
                job.failure = f"{type(error).__name__}: {error}"
        else:
            for job, output in zip(batch, outputs, strict=True):
                job.output = output
        for job in batch:
            job.done.set()

    @torch.inference_mode()
    def _generate(self, batch: list[Job]) -> list[list[int]]:
        """Returns the new tokens of each row."""
        ids = torch.tensor([job.prompt for job in batch])
        names = [BASE if job.adapter is None else f"a{job.adapter}" for job in batch]
        options: dict[str, Any] = {}
        mode: AbstractContextManager[Any] = nullcontext()
        if set(names) == {BASE}:
            mode = self._model.disable_adapter()
        elif len(set(names)) == 1:
            self._model.set_adapter(names[0])
        else:
            options["adapter_names"] = names
        with mode:
            found = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=batch[0].tokens,
                max_new_tokens=batch[0].tokens,
                **options,
            )
        rows: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return rows


def load(options: argparse.Namespace) -> Any:
    """Loads the model with all adapters, in bf16."""
    base = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model = PeftModel.from_pretrained(base, options.adapters[0], adapter_name="a0")
    for i, directory in enumerate(options.adapters[1:], 1):
        model.load_adapter(directory, adapter_name=f"a{i}")
    # PEFT loads adapters in fp32, for training; the base's type is faster.
    return model.to(torch.bfloat16).eval()


def handler(batcher: Batcher) -> type[BaseHTTPRequestHandler]:
    """Returns the handler class: any GET is a health check, any POST a request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, b"ok")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            job = Job(body["prompt"], body["adapter"], body["tokens"])
            batcher.submit(job)
            if job.failure:
                self._reply(500, job.failure.encode())
            else:
                self._reply(200, b"data: " + json.dumps({"output": job.output}).encode() + b"\n\n")

        def log_message(self, format: str, *args: object) -> None:
            """Logs no requests."""

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def main() -> None:
    """Loads the model and serves until the process is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--adapters", nargs="+", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batcher = Batcher(load(options), options.slots)
    threading.Thread(target=batcher.run, daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", options.port), handler(batcher)).serve_forever()


if __name__ == "__main__":
    main()
