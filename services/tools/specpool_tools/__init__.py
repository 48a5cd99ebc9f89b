"""The roof: the `specpool` command and everything that starts, measures or plans the services below."""
