"""llama.cpp as a peer: built from the source in a pinned package, fed with the very weights of our models.

Building takes some minutes and happens once; the tree and the converted models stay in the cache.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from specpool.errors import Internal
from specpool.paths import cache_directory
from specpool_engine.modeling.files import GGUF_NAME
from specpool_tools.models.catalogue import find_entry

VERSION = "0.3.36"
"""Of llama-cpp-python, whose source distribution carries the source of llama.cpp."""

_CPU_OPTIONS = {
    "avx2": ("AVX", "AVX2", "FMA", "F16C", "BMI2"),
    "avx512f": ("AVX512",),
    "avx512_vbmi": ("AVX512_VBMI",),
    "avx512_vnni": ("AVX512_VNNI",),
    "avx512_bf16": ("AVX512_BF16",),
}
"""CPU flag -> ggml's build options. AMX is left out: its kernel has crashed on virtual machines."""


def build_options(cpu_flags: Sequence[str]) -> list[str]:
    """What cmake is told: every vector extension that this CPU has, by name, so that AMX stays off."""
    options = [f"-DGGML_{name}=ON" for flag, names in _CPU_OPTIONS.items() if flag in cpu_flags for name in names]
    general = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_OPENMP=OFF"]
    return [*general, "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", *options]


def cpu_flags() -> list[str]:
    """Flags of the first core; none where the kernel lists none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return line.partition(":")[2].split()
    return []


def home() -> Path:
    """Source, build and converted models."""
    return cache_directory() / "peers" / f"llama.cpp-{VERSION}"


_PROGRAMS = ("llama-server", "llama-quantize", "llama-perplexity")


def build() -> None:
    """Download and build the programs that we use, unless they are there. Needs cmake, ninja and a C++ compiler."""
    if all(_binary(name).is_file() for name in _PROGRAMS):
        return
    if not shutil.which("c++"):
        raise Internal("llama.cpp is built from source: install a C++ compiler (package g++)")
    source = _source()
    _run("cmake", "-S", str(source), "-B", str(home() / "build"), "-G", "Ninja", *build_options(cpu_flags()))
    _run("cmake", "--build", str(home() / "build"), "--target", *_PROGRAMS)


def convert(model: str, weights: str) -> Path:
    """A fetched model as GGUF. `weights`: bf16, a format of llama-quantize such as Q4_K_M, or "file", as it came."""
    if weights == "file":
        return find_entry(model).directory / GGUF_NAME
    path = home() / f"{find_entry(model).name}.{weights}.gguf"
    if path.is_file():
        return path
    partial = path.with_suffix(".partial")
    if weights == "bf16":
        script = _source() / "convert_hf_to_gguf.py"
        arguments = (str(find_entry(model).directory), "--outtype", "bf16", "--outfile", str(partial))
        _run(sys.executable, str(script), *arguments, environment={"PYTHONPATH": str(_source() / "gguf-py")})
    else:
        _run(str(_binary("llama-quantize")), str(convert(model, "bf16")), str(partial), weights)
    return partial.rename(path)


def save_scores(model: Path, text: Path, scores: Path, *, context: int, num_chunks: int, num_threads: int) -> None:
    """Log-probabilities of the second half of each chunk of a text, `context` tokens long, by llama-perplexity.

    They go to the file `scores`: see `weight_quality.read_scores`.
    """
    options = ("-c", str(context), "-b", str(context), "--chunks", str(num_chunks))
    threads = ("-t", str(num_threads), "-tb", str(num_threads))
    files = ("-m", str(model), "-f", str(text), "--save-all-logits", str(scores))
    _run(str(_binary("llama-perplexity")), *files, *options, *threads)


@contextmanager
def running_server(
    target: Path,
    draft: Path | None,
    *,
    num_threads: int,
    context: int,
    n_max: int = 0,
    p_min: float = 0.0,
    timeout_s: float = 120.0,
) -> Iterator[LlamaServer]:
    """A server on a free port, with speculative decoding if there is a draft.

    Args:
        target: GGUF file.
        draft: GGUF file of a draft model.
        num_threads: of either model; they take turns.
        context: tokens, prompt and answer.
        n_max: draft tokens per verification. This version takes it when it starts and ignores it in requests.
        p_min: drafting ends at a token that is less likely.
        timeout_s: to load.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(_binary("llama-server")), "-m", str(target), "-c", str(context), "--parallel", "1"]
    command += ["-t", str(num_threads), "-tb", str(num_threads), "--port", str(port)]
    if draft:
        # --model-draft alone drafts nothing: the kind of speculation has to be named.
        command += ["--model-draft", str(draft), "--spec-type", "draft-simple", "-td", str(num_threads)]
        command += ["--spec-draft-n-max", str(n_max), "--spec-draft-p-min", str(p_min)]
    log = home() / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    server = LlamaServer(port)
    try:
        server.wait_ready(process, log, timeout_s)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


class LlamaServer:
    """The part of llama-server's HTTP interface that we need."""

    def __init__(self, port: int) -> None:
        self._port = port

    def wait_ready(self, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
        """Until the model is loaded; `Internal` with the end of the log if the server ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if self._request("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise Internal(f"llama-server did not become ready within {timeout_s:.0f} s; its last lines:\n{tail}")

    def complete(self, token_ids: Sequence[int], **options: object) -> tuple[list[int], Mapping[str, float]]:
        """Answer's token ids, and the server's own `timings`."""
        body = {"prompt": list(token_ids), "cache_prompt": False, "return_tokens": True, **options}
        status, answer = self._request("POST", "/completion", body)
        if status != 200:
            raise Internal(f"llama-server answered {status}: {answer}")
        return answer["tokens"], answer["timings"]

    def _request(self, method: str, path: str, body: Mapping[str, object] | None = None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()


def _binary(name: str) -> Path:
    return home() / "build" / "bin" / name


def _source() -> Path:
    root = home() / "source"
    if not root.is_dir():
        home().mkdir(parents=True, exist_ok=True)
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python")
        _run(*pip, "--dest", str(home()), f"llama-cpp-python=={VERSION}")
        with tarfile.open(home() / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
            archive.extractall(home() / "partial", filter="data")
        (home() / "partial" / f"llama_cpp_python-{VERSION}").rename(root)
    return root / "vendor" / "llama.cpp"


def _run(*command: str, environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise Internal(f"`{' '.join(command)}` failed with status {done.returncode}:\n{tail}")
