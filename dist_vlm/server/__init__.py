"""The OpenAI-Vision-compatible HTTP server. It needs the packages of `pip install 'dist-vlm[server]'`."""
