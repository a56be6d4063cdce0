"""A web page that shows what adapters make of pictures: `fastprompt demo`.

`models.py` loads the adapters, `views.py` computes what is shown of one picture, `page.py` is the page, with Gradio.
"""
