"""Running a method at real sites: our methods, validation and aggregation over Flower's transport (extra ``flower``).

The server's half is ``server`` (the one server loop with an executor whose clients are sites), the site's half
``site`` (the same worker as everywhere, its policy, its ledger). Flower carries sealed envelopes between them.
"""
