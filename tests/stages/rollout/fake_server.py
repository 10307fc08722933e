"""A scripted stand-in for a server of vLLM: the same endpoints, and faults on demand.

A fault is a file in the folder `--faults`, named for what happens to the next request that asks
for tokens: `kill`, `stop` (as SIGSTOP does), `error`, `refuse`, `version`, `slow` and `busy` (these
two go on working, for half a minute and for three seconds). A number may follow the name; a file
that ends in `.always` is not used up. The fault `start` ends a server that starts; `foreign` makes
one that knows none of our requests. Tokens follow from the prompt and the seed alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

TOKEN_SECONDS = 0.002
SLOW_SECONDS = 30.0
BUSY_SECONDS = 3.0


def tokens(prompt: list[int], seed: int, count: int) -> list[int]:
    return [(sum(prompt) + seed + 7 * step) % 50 + 3 for step in range(count)]


def logits(ids: list[int]) -> list[list[float]]:
    return [[sum(ids[: end + 1]) / 8, end / 2] for end in range(len(ids))]


class State:
    def __init__(self, faults: Path) -> None:
        self.faults = faults
        self.version = "default"
        self.weights = 0.0
        self.temperature = 0.0
        self.num_resets = 0
        self.num_tokens = 0
        self.lock = threading.Lock()

    def fault(self, names: tuple[str, ...]) -> str | None:
        """Use up one of the faults of these names."""
        with self.lock:
            for path in sorted(self.faults.iterdir()):
                name = path.name.partition(".")[0].rstrip("0123456789")
                if name not in names:
                    continue
                if path.suffix != ".always":
                    try:
                        path.unlink()
                    except FileNotFoundError:  # another server was faster
                        continue
                return name
        return None


class Handler(BaseHTTPRequestHandler):
    state: State

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        state = self.state
        if self.path == "/metrics":
            with state.lock:
                self.answer(f'vllm:generation_tokens_total{{engine="0"}} {state.num_tokens}\n')
        elif self.path == "/state":
            self.answer({name: value for name, value in vars(state).items() if name != "faults"})
        elif self.path == "/v1/models":
            self.answer({"data": [{"id": "fake", "max_model_len": 64}]})
        else:
            self.answer("")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        if state.fault(("foreign",)):
            return self.answer({"error": {"message": "Not Found"}}, 404)
        match self.path:
            case "/collective_rpc" if body["method"] == "load_policy":
                state.weights = sum(float(t.sum()) for t in load_file(body["args"][0]).values())
                self.answer({"results": [None]})
            case "/collective_rpc":
                assert body["method"] == "set_policy_temperature", body
                state.temperature = body["args"][0]
                self.answer({"results": [None]})
            case "/update_weight_version":
                state.version = body["new_version"]
                self.answer({"success": True})
            case "/reset_prefix_cache":
                state.num_resets += 1
                self.answer({"success": True})
            case "/inference/v1/generate":
                self.generate(body)
            case "/pooling":
                assert body["task"] == "token_classify" and body["use_activation"] is False
                if state.fault(("kill",)):
                    os.kill(os.getpid(), signal.SIGKILL)
                with state.lock:
                    state.num_tokens += len(body["input"])
                self.answer({"data": [{"index": 0, "data": logits(body["input"])}]})
            case _:
                self.answer({"error": {"message": f"no {self.path} here"}}, 404)

    def generate(self, body: dict[str, Any]) -> None:
        state, params = self.state, body["sampling_params"]
        version = state.version
        match state.fault(("kill", "stop", "error", "refuse", "slow", "busy", "version")):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "error":
                return self.answer({"error": {"message": "EngineDeadError"}}, 500)
            case "refuse":
                return self.answer({"error": {"message": "top_k must be an integer"}}, 400)
            case "slow" | "busy" as fault:
                for _ in range(int((SLOW_SECONDS if fault == "slow" else BUSY_SECONDS) / 0.05)):
                    time.sleep(0.05)
                    with state.lock:
                        state.num_tokens += 1
            case "version":
                version = "of somebody else"
        time.sleep(TOKEN_SECONDS * params["max_tokens"])
        choices = []
        for index in range(params["n"]):
            ids = tokens(body["token_ids"], params["seed"] + index, params["max_tokens"])
            choices.append(
                {
                    "index": index,
                    "finish_reason": "length",
                    "token_ids": ids,
                    "logprobs": {"content": [{"token_id": i, "logprob": -i / 64} for i in ids]},
                    "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
                }
            )
            with state.lock:
                state.num_tokens += len(ids)
        self.answer({"choices": choices[::-1]})

    def answer(self, content: object, status: int = 200) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content, default=str)
        data = data if isinstance(data, bytes) else data.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # whoever asked is gone
            pass


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


class TcpServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no test leaves it behind
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=Path, required=True)
    parser.add_argument("--uds", default=None)
    arguments = parser.parse_args()
    Handler.state = State(arguments.faults)
    if Handler.state.fault(("start",)):
        print("no memory for the cache of keys and values")
        sys.exit(1)
    if arguments.uds is not None:
        UnixServer(arguments.uds, Handler).serve_forever()
    server = TcpServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
