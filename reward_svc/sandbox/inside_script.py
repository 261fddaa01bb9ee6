"""Within the sandbox: runs a program as `__main__`; what it prints is compared by the service."""

import sys


def run_script(program):
    """Runs the program; its exit code is the process's."""
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    sys.set_int_max_str_digits(0)
    exec(compile(program, "solution.py", "exec"), namespace)


run_script(PAYLOAD["program"])
