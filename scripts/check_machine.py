"""Is this machine fit for `make setup`? Runs under any Python 3, before anything is installed."""

import platform
import shutil
import sys

problems = []
if sys.version_info[:2] != (3, 11):
    found = platform.python_version()
    problems.append(
        f"Python 3.11 is needed, found {found} at {sys.executable}; install it and run: make setup PYTHON=python3.11"
    )
try:
    import ensurepip  # noqa: F401
    import venv  # noqa: F401
except ImportError:
    problems.append("Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv")
if not any(map(shutil.which, ("cc", "gcc", "clang"))):
    problems.append("a C compiler is needed (cc, gcc or clang); on Debian and Ubuntu: apt-get install build-essential")
if platform.system() != "Linux" or platform.machine() != "x86_64":
    problems.append(f"the locked sets are for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
if problems:
    sys.exit("make setup cannot go on:\n" + "\n".join("  - " + problem for problem in problems))
