"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kitae.serve.engine import EngineThread

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The numbers of one server; it has a registry of its own."""

    def __init__(self, engine: EngineThread) -> None:
        self._registry = CollectorRegistry()
        own = self._registry
        self.requests = Counter(
            "kitae_requests", "Requests answered, by path and HTTP status.", ["path", "status"], registry=own
        )
        self.disconnects = Counter(
            "kitae_disconnects", "Clients that went before their answer ended.", registry=own
        )
        self.prompt_tokens = Counter("kitae_prompt_tokens", "Prompt tokens read.", ["model"], registry=own)
        self.completion_tokens = Counter(
            "kitae_completion_tokens", "Tokens sampled.", ["model"], registry=own
        )
        self.first_token_s = Histogram(
            "kitae_time_to_first_token_seconds",
            "From request to first token.",
            buckets=_FIRST_TOKEN_S,
            registry=own,
        )
        self.request_s = Histogram(
            "kitae_request_seconds",
            "From request to the end of its answer.",
            buckets=_REQUEST_S,
            registry=own,
        )
        running = Gauge("kitae_completions_running", "Completions being sampled.", registry=own)
        running.set_function(lambda: engine.num_running)
        waiting = Gauge("kitae_completions_waiting", "Completions that wait for a row.", registry=own)
        waiting.set_function(lambda: max(0, engine.num_open - engine.num_running))

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
