"""python -m serving.runtime: Cog's server as a child process that ends with its parent."""

import runpy

from serving.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    runpy.run_module("cog.server.http", run_name="__main__", alter_sys=True)
