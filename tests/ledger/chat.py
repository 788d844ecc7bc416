"""Planted bugs of data/chat.py and of how a chat format is recognised, and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_chat.py::"

IDS = "test_ids_equal_those_of_the_chat_template"
KNOWN = "test_the_format_of_a_checkpoint_is_recognised"
ALIKE = "test_templates_that_only_look_alike_are_refused"
ADDED = "test_templates_with_something_added_are_refused"
QWEN3S = "test_templates_like_that_of_qwen3_are_refused"
PLACE = "test_a_template_in_the_settings_or_in_a_file"
LACKS = "test_a_tokenizer_without_the_tokens_of_the_format_is_refused"
MASK = "test_the_mask_covers_each_answer_and_its_ending_token"
QWEN3 = "test_qwen3_trains_on_what_follows_the_last_question"
ASKED = "test_a_prompt_is_a_question_or_a_conversation"
PREFIX = "test_a_generation_prompt_is_the_beginning_of_what_was_trained_on"
SEAM = "test_no_token_reaches_across_the_seam"
PAD = "test_padding_may_be_the_ending_token"
SAYS = "test_what_people_write_is_never_special"
NAMES = "test_some_names_are_special_where_they_belong"
TOOL = "test_a_tool_cannot_close_its_own_turn"
SAID = "test_a_completion_is_what_comes_before_an_ending_token"
LLAMA = "test_llama_begins_once_with_bos_and_its_dates"
CLI = "test_the_command_colours_what_is_trained_on"

IN_CHAT = [
    # the mask
    ("S5: the ending token not trained", "end._replace(trained=trained), newline)", "end, newline)", MASK),
    ("S5: the ending token of Llama not trained", "end._replace(trained=True))", "end)", MASK),
    ("the line after the answer trained", "newline)  # fmt: skip", "newline._replace(trained=trained))", MASK),
    (
        "the header of the answer trained",
        'Part("assistant\\n"), Part(content',
        'Part("assistant\\n", trained=True), Part(content',
        MASK,
    ),
    ("S20: a mask of truth values", "[int(part.trained)] * len(new)", "[part.trained] * len(new)", IDS),
    ("S7: everything trained", "mask += [int(part.trained)]", "mask += [1]", MASK),
    (
        "the first token of an answer not trained",
        "mask += [int(part.trained)] * len(new)",
        "mask += [0] * (part.trained and not part.special) + [int(part.trained)] * (len(new) - (part.trained and not "
        "part.special))",
        MASK,
    ),
    (
        "only the last answer trained",
        "            trained = True\n",
        "            trained = i == len(messages) - 1\n",
        MASK,
    ),
    (
        "mask from pad ids",
        "mask += [int(part.trained)] * len(new)",
        "mask += [int(part.trained and n != tokenizer.pad_id) for n in new]",
        PAD,
    ),
    ("bos in the ids, not in the mask", "[tokenizer.bos_id], [0]", "[tokenizer.bos_id], []", IDS),
    # seams and prompts
    (
        "S10: the answer encoded together with what comes before",
        'yield from (start, Part("assistant\\n"), Part(content, trained',
        'yield from (start, Part("assistant\\n" + content, trained',
        SEAM,
    ),
    (
        "S13: bos in training, not at generation",
        "if llama and tokenizer.bos_id is not None:",
        "if llama and tokenizer.bos_id is not None and not add_generation_prompt:",
        PREFIX,
    ),
    (
        "S14: generation prompt without its line break",
        'yield from (start, Part("assistant\\n"))',
        'yield from (start, Part("assistant"))',
        PREFIX,
    ),
    (
        "S14: Llama's generation prompt without its line breaks",
        'yield from (*header("assistant"), Part("\\n\\n"))',
        'yield from header("assistant")',
        PREFIX,
    ),
    (
        "S14: a question without a generation prompt",
        "return render(messages, tokenizer, add_generation_prompt=True)",
        "return render(messages, tokenizer, add_generation_prompt=False)",
        ASKED,
    ),
    (
        "no generation prompt",
        "    if add_generation_prompt:\n        yield from (start,",
        "    if False:\n        yield from (start,",
        IDS,
    ),
    ("two bos", "ids, mask = [tokenizer.bos_id], [0]", "ids, mask = [tokenizer.bos_id] * 2, [0] * 2", LLAMA),
    # formats
    (
        "S11: default system message missing",
        'if DEFAULT_SYSTEM[chat_format] and messages[0]["role"] != "system":',
        "if False:",
        IDS,
    ),
    (
        "default system message besides the given one",
        'if DEFAULT_SYSTEM[chat_format] and messages[0]["role"] != "system":',
        "if DEFAULT_SYSTEM[chat_format]:",
        IDS,
    ),
    ("another default system message", "You are a helpful AI assistant named", "You are an AI assistant named", IDS),
    ("another day", "Today Date: 26 Jul 2024", "Today Date: 27 Jul 2024", IDS),
    (
        "Llama 3.1 without its system turn",
        'if chat_format == "llama3.1":\n        has',
        'if chat_format == "llama3.2":\n        has',
        LLAMA,
    ),
    ("Llama's system message twice", "messages = messages[has_system:]", "messages = messages[0:]", IDS),
    (
        "Llama's white space kept",
        'role, content = message["role"], message["content"].strip()',
        'role, content = message["role"], message["content"]',
        IDS,
    ),
    ("white space of the system message kept", 'messages[0]["content"].strip() if', 'messages[0]["content"] if', IDS),
    ("Llama's tools as plain text", 'json.dumps(message["content"], ensure_ascii=False)', 'message["content"]', IDS),
    (
        "Llama's tools in ASCII",
        'json.dumps(message["content"], ensure_ascii=False)',
        'json.dumps(message["content"])',
        IDS,
    ),
    ("Llama 3 has the role of 3.1 for tools", 'role == "tool" and chat_format == "llama3.1"', 'role == "tool"', IDS),
    ("tools in a turn of their own", 'chat_format.startswith(("qwen2.5", "qwen3")):', "False:", IDS),
    ("S14: the base model's default system message", '"qwen2.5-base": "You', '"qwen2.5-base": "You are Qwen. You', IDS),
    (
        "tools in the user's turn where the template has none",
        'chat_format.startswith(("qwen2.5", "qwen3")):',
        'chat_format.startswith("qwen"):',
        IDS,
    ),
    ("a turn for each result", 'first = i == 0 or messages[i - 1]["role"] != "tool"', "first = True", IDS),
    (
        "a turn ends after each result",
        'last = i == len(messages) - 1 or messages[i + 1]["role"] != "tool"',
        "last = True",
        IDS,
    ),
    # qwen3
    (
        "S11: reasoning kept in earlier answers",
        "if not keep_reasoning or not (reasoning or is_last):\n        return said",
        "if not (reasoning or is_last):\n        return said\n    if not keep_reasoning:\n        return content",
        QWEN3,
    ),
    ("earlier answers without their reasoning trained", "trained = i > last_question", "trained = True", QWEN3),
    ("the first question counts", "last_question = questions[-1] if", "last_question = questions[0] if", QWEN3),
    (
        "a tool's result is a question",
        'questions = [i for i, message in enumerate(messages) if message["role"] == "user"',
        'questions = [i for i, message in enumerate(messages) if message["role"] in ("user", "tool")',
        QWEN3,
    ),
    ("a result that the user brings is a question", 'message["content"].startswith(TOOL[0]) and', "False and", QWEN3),
    ("reasoning without a question", "if questions else len(messages) - 1", "if questions else -1", IDS),
    ("no empty reasoning in the last answer", "(reasoning or is_last)", "reasoning", IDS),
    ("empty reasoning in every answer", "(reasoning or is_last)", "True", IDS),
    ("line breaks around reasoning kept", '.rpartition("<think>")[2].strip("\\n")', '.rpartition("<think>")[2]', IDS),
    (
        "what is said begins after the first reasoning",
        'content.rpartition("</think>")[2].lstrip',
        'content.partition("</think>")[2].lstrip',
        IDS,
    ),
    (
        "reasoning ends with the last mark",
        'content.partition("</think>")  # of',
        'content.rpartition("</think>")  # of',
        IDS,
    ),
    # what people write
    (
        "special tokens in what the user writes",
        'names=OF_USER if role == "user" else ()), end, newline)',
        'names=("<|im_end|>",)), end, newline)',
        SAYS,
    ),
    (
        "special tokens in what the user of Llama writes",
        'yield from (*header(role), Part(f"\\n\\n{content}", names=OF_USER if role == "user" else ()), end)',
        'yield from (*header(role), Part(f"\\n\\n{content}", names=("<|eot_id|>",)), end)',
        SAYS,
    ),
    ("the assistant may write ends of turns", '"</tool_call>")\n', '"</tool_call>", "<|im_end|>")\n', SAYS),
    (
        "the system message may hold images",
        'names=OF_USER if role == "user" else ()), end, newline)',
        "names=OF_USER), end, newline)",
        SAYS,
    ),
    ("no images in questions", 'OF_USER = ("<image>",)', "OF_USER = ()", NAMES),
    ("reasoning of Llama is plain text", "trained=True, names=OF_ASSISTANT)", "trained=True)", NAMES),
    ("a picture of Llama is plain text", 'yield from (*header(role), Part(f"\\n\\n{content}", names=OF_USER if',
     'yield from (*header(role), Part(f"\\n\\n{content}", names=() if', NAMES),
    ("a question that begins like a tool is none", " and message[\"content\"].endswith(TOOL[1]))", ")", QWEN3),
    ("line breaks of an answer stay behind its reasoning", "{said.lstrip(chr(10))}", "{said}", QWEN3),
    ("reasoning is plain text", 'OF_ASSISTANT = ("<think>", "</think>",', "OF_ASSISTANT = (", NAMES),
    ("the user may reason", 'OF_USER = ("<image>",)', 'OF_USER = ("<image>", "<think>")', NAMES),
    ("a tool closes its own turn", "names = () if any(tag in content for tag in TOOL) else TOOL", "names = TOOL", TOOL),
    (
        "no special token around a result",
        "names = () if any(tag in content for tag in TOOL) else TOOL",
        "names = ()",
        TOOL,
    ),
    # the rest
    ("any format is ChatML", "if chat_format not in FORMATS:", "if False:", LACKS),
    (
        "the format asked for is passed over",
        "chat_format = chat_format or tokenizer.chat_format",
        "chat_format = tokenizer.chat_format or chat_format",
        LACKS,
    ),
    (
        "G13: the ending token is said",
        "return tokenizer.decode(ids[:end])",
        "return tokenizer.decode(ids[: end + 1])",
        SAID,
    ),
    (
        "G14: only the first of the ending tokens ends",
        "if token in tokenizer.eos_ids)",
        "if token == tokenizer.eos_ids[0])",
        SAID,
    ),
    (
        "completion without an end loses its last token",
        "if token in tokenizer.eos_ids), len(ids))",
        "if token in tokenizer.eos_ids), len(ids) - 1)",
        SAID,
    ),
    ("the wrong tokens in colour", 'if trained else text, end="")', 'if not trained else text, end="")', CLI),
    ("bad data ends with code 1", "sys.exit(2)", "sys.exit(1)", CLI),
    (
        "a wrong flag prints the usage, too",
        'parser.exit(2, f"{parser.prog}: {message}\\n")',
        'parser.exit(2, f"{parser.format_usage()}{parser.prog}: {message}\\n")',
        CLI,
    ),
    ("--map passed over", "mapping=formats.parse_map(args.map))", "mapping={})", CLI),
]
IN_TOKENIZER = [
    ("Llama 3.2 taken for 3.1, whose date stands still", '("strftime_now",)', "()", ALIKE),
    (
        "Llama 3 taken for 3.1",
        '("<|start_header_id|>", "Cutting Knowledge Date", "26 Jul 2024")',
        '("<|start_header_id|>",)',
        KNOWN,
    ),
    (
        "any template with reasoning is Qwen3's",
        '"qwen3": (("last_query_index", "<think>\\n\' +")',
        '"qwen3": (("<think>",)',
        QWEN3S,
    ),
    (
        "templates that begin the reasoning themselves",
        '("assistant\\n<think>", "<function=",',
        '("<function=",',
        QWEN3S,
    ),
    ("templates with another form of calls", '"<function=", "vision", "endgen")', '"vision", "endgen")', QWEN3S),
    ("any ChatML with a system message", '("system", "tool", "think", "image",', '("tool", "think", "image",', ADDED),
    ("ChatML that puts bos first", '"bos_token", "eos_token", "trim"', '"eos_token", "trim"', ADDED),
    ("ChatML that trims", '"eos_token", "trim", "strip"', '"eos_token", "strip"', ADDED),
    ("ChatML that reasons", '("system", "tool", "think", "image",', '("system", "tool", "image",', ADDED),
    (
        "any default system message is Qwen2's",
        '"qwen2": (("system\\nYou are a helpful assistant.<|im_end|>"',
        '"qwen2": (("system\\nYou are a helpful assistant"',
        ADDED,
    ),
    ("templates without a known mark", 'if "<|im_start|>" not in template and', "if False and", ADDED),
    ("line breaks written as they are", 'template = template.replace("\\\\n", "\\n")', "template = template", KNOWN),
    (
        "the settings go before the file",
        'files.get("chat_template.jinja") or settings.get("chat_template") or ""',
        'settings.get("chat_template") or files.get("chat_template.jinja") or ""',
        PLACE,
    ),
    ("no template in a file", 'files.get("chat_template.jinja") or settings', "settings", PLACE),
    (
        "no template in the settings",
        'files.get("chat_template.jinja") or settings.get("chat_template") or ""',
        'files.get("chat_template.jinja") or ""',
        PLACE,
    ),
    ("the first of several templates", 'if named["name"] == "default"', "if named", PLACE),
    ("a format that was asked for is not saved", '"{}")) | {"chat_format": chat_format}', '"{}"))',
     "test_a_format_that_was_asked_for_is_saved"),
    ("S14: the old template stays in the settings", '        settings.pop("chat_template", None)\n', "",
     "test_a_format_that_was_asked_for_is_saved"),
    ("S14: the old template stays in its file", 'if name != "chat_template.jinja"}', "}",
     "test_a_format_that_was_asked_for_is_saved"),
    ("the saved format is not read", "    if named in marks:", "    if False:",
     "test_a_format_that_was_asked_for_is_saved"),
    ("every template is that of Qwen2.5's base model", '"qwen2.5-base": (("system\\nYou are a helpful assistant.'
     '<|im_end|>", "<tool_response>"), (', '"qwen2.5-base": (("",), (', KNOWN),
    ("several templates without a default", '== "default"), "")', '== "default"), template[0]["template"])', PLACE),
]
MUTANTS = [
    Mutant(name, file, old, new, TESTS + test)
    for file, bugs in (("data/chat.py", IN_CHAT), ("data/tokenizer.py", IN_TOKENIZER))
    for name, old, new, test in bugs
]
