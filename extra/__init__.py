"""What builds on `common` and a reader need not read: released weights, metrics, the plans of dry runs."""
