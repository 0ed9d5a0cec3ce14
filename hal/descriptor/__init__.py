"""What a chip may be described by (schema, capabilities); no chip is named here."""
from typing import Any
Descriptor = Any
