import importlib.util, os, sys
if os.environ.get("VARIANT"):
    spec = importlib.util.spec_from_file_location("vlprune.kernels.attention_rows.triton", os.path.join(os.path.dirname(__file__), "ar_ev_tmp.py"))
    mod = importlib.util.module_from_spec(spec); sys.modules[spec.name] = mod; spec.loader.exec_module(mod)
from vlprune.kernels.benchmarks.run import main
sys.exit(main())
