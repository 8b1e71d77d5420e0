"""The former name of `rlg.preferences`, kept for one release."""

import runpy

if __name__ == "__main__":
    runpy.run_module("rlg.preferences", run_name="__main__", alter_sys=True)
