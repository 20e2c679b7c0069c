"""A memory for programs elsewhere: REST and a web page, and MCP; both made from one list of verbs.

Needs the extra `serve`. One process serves one file; other processes may use it at the same time.
"""

from __future__ import annotations

from memwise.serve.pool import Options, Pool, UnknownBank

__all__ = ["Options", "Pool", "UnknownBank"]
