"""What the integration tests share: a mosquitto that can be killed, and edges in this process that are stopped whatever happens."""

# The agent imports aiohttp's server half only. In this process the client half is needed as well, so the whole comes first.
import aiohttp  # noqa: F401
import pytest

from .edges import MOSQUITTO, Edges, LocalBroker


@pytest.fixture
def broker(tmp_path):  # type: ignore[no-untyped-def]
    """A mosquitto on a free port of loopback."""
    if not MOSQUITTO:
        pytest.skip("mosquitto is not installed")
    local = LocalBroker(tmp_path / "broker")
    local.start()
    yield local
    local.stop()


@pytest.fixture
async def edges(tmp_path):  # type: ignore[no-untyped-def]
    """Makes edges; every one that is still up is stopped at the end."""
    made = Edges(tmp_path / "edge")
    yield made
    await made.stop_all()
