"""The forwarders: one process per sink, each draining the spool with acknowledgements."""
