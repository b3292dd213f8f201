"""The settings' page is that of the settings."""

from pathlib import Path

from sapo_ray.control.settings_reference import page

DOCS = Path(__file__).parents[3] / "docs"


def test_the_settings_page_is_that_of_the_settings() -> None:
    assert (DOCS / "settings.md").read_text() == page(), "run `make docs`"
    assert "| `SAPO_HEARTBEAT_TIMEOUT_S` | `60.0` | A driver not heard of for so long is replaced. |" in page()
