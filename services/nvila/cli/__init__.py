"""The `nvila` command: what a person types, and the supervisor that keeps a stack of programs running on one machine.

In: a command line. Out: results on stdout, progress and logs on stderr, `--json` where a program may read it, and an
exit status that names the kind of error. A verb's module is imported when the verb runs, so `--help` is instant.
"""
