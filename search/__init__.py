"""What fits where: work, cost models, quality, sensitivities, the exact solver, and the search over them.

``intarsia.search(...)`` is also the verb of the public API, so this package can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``intarsia.flow.search``: the package and the verb share a name."""
        from importlib import import_module

        return import_module("intarsia.flow").search(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
