"""A frozen backbone and its adapters behind HTTP: `fastprompt serve`.

`protocol.py` is what requests and answers say, `tenants.py` computes them with one `fp.Engine`, `routes.py` takes and
refuses requests within the memory that `budget.py` counts. `host.py` puts them on LitServe for one machine, behind the
connections of `connections.py` and with a process for the engine (`worker.py`) that `supervisor.py` keeps alive by its
`signs.py`; `cluster.py` puts them on Ray Serve for several machines.
"""
