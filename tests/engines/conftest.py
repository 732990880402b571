"""Scripts that run in a Python with vLLM are no tests."""

collect_ignore = ["vllm_truth.py", "vllm_loads.py"]
