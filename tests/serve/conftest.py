"""A server that all tests of the session share, and a client that speaks to it."""

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("openai")


@pytest.fixture(scope="session")
def thinker(tiny):
    """A tiny model whose template begins each answer with <think>."""
    return tiny("qwen3", prefill="<think>\n")


@pytest.fixture(scope="session")
def running(thinker):
    from serving import Running

    server = Running(thinker)
    yield server
    server.close()


@pytest.fixture(scope="session")
def client(running):
    return running.client()
