"""Where processes are: one interface (`discovery.Discovery`), four ways behind it.

Routers find their targets and speculators with it, and whoever uses speculators finds those. Start reading in
`discovery`; `directory.parse` makes one from a setting. `kubernetes` is imported when it is used, not before.
"""
