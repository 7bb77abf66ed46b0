"""How the service is packed, started and watched."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
