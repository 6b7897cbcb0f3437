READERS={}
missing_line=read_reply=schema=None
