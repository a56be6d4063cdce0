"""A frozen backbone and its adapters behind HTTP: `fastprompt serve`.

`protocol.py` is what requests and answers say, `tenants.py` computes them with one `fp.Engine`, `routes.py` takes and
refuses requests within the memory that `budget.py` counts. `host.py` puts them on LitServe for one machine, behind the
connections of `connections.py`, `cluster.py` on Ray Serve for several.
"""
