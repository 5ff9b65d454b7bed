"""The `backboned` command where packages are missing. Each case is a Python of its own, in which some can't import."""

import asyncio
import os
import subprocess
import sys

import grpc
import grpc.aio
import pytest

ENTRY = "import sys; from backboned.server.entry import main; sys.exit(main())"


@pytest.mark.parametrize("package", ["typer", "torch"])
def test_a_missing_package_is_told_in_one_line_that_names_the_extra(package: str) -> None:
    done = run_without(package, "serve")
    assert (done.stdout, done.returncode) == ("", 2)
    (line,) = done.stderr.splitlines()
    assert repr(package) in line
    assert "pip install 'backboned[server]'" in line


def test_a_missing_module_of_our_own_is_a_bug_with_a_traceback() -> None:
    done = run_without("backboned.server.commands", "serve")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "pip install" not in done.stderr


def run_without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with `arguments` where `module` can't be imported."""
    code = f"import sys; sys.modules[{module!r}] = None; {ENTRY}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


async def test_a_daemon_that_ends_in_the_middle_of_a_call_is_told_in_one_line() -> None:
    """Without its being told not to, gRPC often writes a line of its own beside it."""
    asked: asyncio.Queue[bytes] = asyncio.Queue()

    async def wait(request: bytes, _context: object) -> bytes:
        await asked.put(request)
        await asyncio.sleep(60)
        return b""

    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(wait)
    methods = {"ListModels": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("backboned.v1.ModelService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    commands = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", ENTRY, "models", f"--server=127.0.0.1:{port}",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        )
        for _ in range(4)
    ]  # fmt: skip
    for _ in commands:
        await asyncio.wait_for(asked.get(), 60)
    await server.stop(None)
    for command in commands:
        out, err = await asyncio.wait_for(command.communicate(), 60)
        assert (command.returncode, out) == (1, b"")
        (line,) = err.decode().splitlines()
        assert line.startswith("error: ")
