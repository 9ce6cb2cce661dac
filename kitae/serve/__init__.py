"""An OpenAI-compatible server over the local rollout engines, and the start of external ones."""
