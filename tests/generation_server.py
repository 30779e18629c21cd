"""A generation server on this machine that speaks as much of vLLM's and SGLang's HTTP as `ServerGenerator` uses."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import AutoModelForCausalLM

from stemma.decode.rollout import generate_groups


class GenerationServer:
    """Serves a model; `with GenerationServer(model) as server: ServerGenerator(server.url, ...)`.

    Attributes:
        model: what is served; loading weights replaces it.
        requests: (path, body, headers) of every request so far.
        most_at_once: the most completions that were under way at a time.
        answer: changes an answer before it is sent; (path, answer) -> answer. A tuple (status, text) is sent as it is.
        gate: completions wait here.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.most_at_once = self._at_once = 0
        self.answer: Callable[[str, Any], Any] = lambda path, answer: answer
        self.gate: Callable[[], Any] = lambda: None
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"service": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "GenerationServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for at, body, _ in self.requests if at == path]

    def handle(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        with self._lock:
            self.requests.append((path, body, headers))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.gate()
            with self._lock:
                return self.answer(path, getattr(self, path.rpartition("/")[2])(body))
        finally:
            with self._lock:
                self._at_once -= 1

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        assert all(body[name] for name in ("ignore_eos", "return_token_ids", "logprobs"))
        assert body["n"] == 1
        ids, logprobs, finished = self._continue(body["prompt"], body["max_tokens"], body["seed"], body)
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": logprobs, "tokens": [f"token_id:{token}" for token in ids]},
            "finish_reason": "stop" if finished else "length",
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
        }
        return {"object": "text_completion", "choices": [choice]}

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        options = body["sampling_params"]
        assert body["return_logprob"]
        assert options["ignore_eos"] == (not options["stop_token_ids"])
        ids, logprobs, finished = self._continue(
            body["input_ids"], options["max_new_tokens"], options["sampling_seed"], options
        )
        meta = {
            "finish_reason": {"type": "stop" if finished else "length"},
            "prompt_tokens": len(body["input_ids"]),
            "output_token_logprobs": [[value, token, None] for value, token in zip(logprobs, ids)],
        }
        return {"text": "", "output_ids": ids, "meta_info": meta}

    def _continue(self, prompt: list[int], max_new_tokens: int, seed: int, options: dict[str, Any]) -> Any:
        assert options["top_k"] == -1 or options["top_k"] > 0
        rollouts = generate_groups(
            self.model,
            [prompt],
            num_generations=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=options["stop_token_ids"],
            stop_strings=options["stop"],
            tokenizer=self.tokenizer,
            temperature=options["temperature"],
            top_p=options["top_p"],
            top_k=max(options["top_k"], 0),
            seed=seed,
        )
        return rollouts.completions[0][0], rollouts.logprobs[0][0].tolist(), rollouts.finished[0][0]

    def collective_rpc(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights"
        self._load(body["kwargs"]["weights_path"])
        return {"results": [None]}

    def reset_prefix_cache(self, body: dict[str, Any]) -> tuple[int, str]:
        return 200, ""

    def update_weights_from_disk(self, body: dict[str, Any]) -> dict[str, Any]:
        self._load(body["model_path"])
        return {"success": True, "message": "Succeeded to update model weights."}

    def _load(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.model.dtype)


class _Handler(BaseHTTPRequestHandler):
    service: GenerationServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            answer = self.service.handle(self.path, body, dict(self.headers))
        except Exception as error:
            answer = 500, f"{type(error).__name__}: {error}"
        status, text = answer if isinstance(answer, tuple) else (200, json.dumps(answer))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass
