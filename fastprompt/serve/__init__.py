"""Serve a frozen backbone and its adapters over HTTP: `fastprompt serve`.

`protocol.py` defines requests and answers, `tenants.py` computes them with one `fp.Engine`, and `routes.py` accepts or
refuses requests within the memory that `budget.py` counts. `host.py` serves them with LitServe on one machine, with the
connections of `connections.py` and a process for the engine (`worker.py`). `supervisor.py` keeps that process alive by
watching its `signs.py`. `cluster.py` serves them with Ray Serve on several machines.
"""
