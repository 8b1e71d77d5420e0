"""The former name of `rlg.pretraining.show`, kept for one release."""

import runpy

if __name__ == "__main__":
    runpy.run_module("rlg.pretraining.show", run_name="__main__", alter_sys=True)
