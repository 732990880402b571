"""What a rule makes of one tensor, as the manifest records it.

The partition itself is in the layout; the role says what a sharded run has to do with it: where partial sums meet
and where cut outputs are joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["column", "row", "replicate"]
Gather = Literal["", "output", "input"]


@dataclass(frozen=True, slots=True)
class Role:
    """``rule`` as the policy has it; ``gather``: which side of the layer must be whole on every rank, if any.

    ``pattern`` is the policy's own key, for messages; it decides nothing.
    """

    rule: Kind
    gather: Gather = ""
    pattern: str = ""
