"""Planted bugs of data/tokenizer.py and the tests that catch them."""

from tests.mutants import Mutant

TESTS = "tests/test_tokenizer.py::"

IDS = "test_ids_equal_those_of_the_library"
DIGITS = "test_no_digits_together_in_smollm2_and_three_in_llama3"
LACKS = "test_a_byte_that_the_vocabulary_lacks_is_left_out"
NEIGHBOURS = "test_the_neighbours_of_a_byte_that_is_left_out_may_merge"
HALF = "test_half_a_surrogate_pair_is_a_replacement_character"
MERGES = "test_merges_may_be_written_in_two_ways"
WHOLE = "test_whole_words_of_the_vocabulary_where_merges_are_ignored"
ENDS = "test_ending_tokens_are_all_that_any_file_names"
SETTINGS = "test_settings_may_hold_whole_tokens"
BOS = "test_bos_is_added_where_the_library_adds_it"
NOT = "test_what_is_not_supported_is_refused"
BROKEN = "test_files_that_are_missing_or_broken_are_refused"
SAVE = "test_what_is_saved_gives_the_library_our_ids"
UNSAVED = "test_a_tokenizer_without_files_is_not_saved"
SAYS = "test_what_a_text_says_is_never_special"
NAMES = "test_special_tokens_by_name"
BYTES = "test_every_byte_goes_there_and_back"
TINY = "test_digits_are_single_tokens_in_the_tiny_tokenizer"
GAP = "test_the_tiny_tokenizer_counts_its_ids_without_a_gap"
TRAIN = "test_training_counts_as_the_definition_says"
WRITE = "test_training_writes_a_tokenizer_that_keeps_digits_apart"
GPT2 = "test_gpt2_is_that_of_tiktoken"
CLI = "test_the_command_shows_the_pieces"

MUTANTS = [
    Mutant(name, "data/tokenizer.py", old, new, TESTS + test)
    for name, old, new, test in [
        # ids of checkpoints
        ("ranks taken for ids", "[self.ids[rank] for piece in pieces for", "[rank for piece in pieces for", IDS),
        ("no normal form", 'unicodedata.normalize("NFC", text) if self.nfc else text', "text", IDS),
        ("the wrong normal form", 'normalize("NFC", text)', 'normalize("NFKC", text)', IDS),
        ("normal form for all", "nfc=normalizer is not None", "nfc=True", IDS),
        ("digits not cut apart", "tuple(_cut_digits(text)) if self.digits_apart else (text,)", "(text,)", IDS),
        (
            "only ASCII digits cut apart",
            'if unicodedata.category(character)[0] == "N":',
            "if character in '0123456789':",
            IDS,
        ),
        ("only decimal digits cut apart", 'unicodedata.category(character)[0] == "N"', "character.isdecimal()", IDS),
        (
            "the text after the last digit lost",
            "    yield text[start:]\n",
            "    yield text[start:] if not start else ''\n",
            IDS,
        ),
        ("a digit swallows the next character", "start = i + 1", "start = i + 2", DIGITS),
        ("GPT-2 without contractions", "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+", " ?\\p{L}+", IDS),
        ("GPT-2's last space stays with the others", '|\\s+(?!\\S)|\\s+"', '|\\s+"', IDS),
        (
            "GPT-2's pattern for all",
            "            return pattern, False\n",
            "            return GPT2_PATTERN, False\n",
            IDS,
        ),
        (
            "special tokens of the vocabulary are words",
            'for token, i in model["vocab"].items() if token not in added}',
            'for token, i in model["vocab"].items()}',
            SAYS,
        ),
        (
            "merges in order of their ids",
            "    ranks: dict[bytes, int] = {}\n",
            "    tokens.sort(key=lambda token: vocab.get(token, -1))\n    tokens.sort(key=len, reverse=True)\n"
            "    ranks: dict[bytes, int] = {}\n",
            IDS,
        ),
        ("a lacking byte is id -1", "return ids if -1 not in ids else [", "return ids or [", LACKS),
        (
            "a lacking byte left out when all is merged",
            "return ids if -1 not in ids else [i for piece in pieces for i in self._encode_known_bytes(piece)]",
            "return [i for i in ids if i >= 0]",
            NEIGHBOURS,
        ),
        (
            "words with a lacking byte merge with each other",
            "regex.finditer(self.encoding._pat_str, text):",
            'regex.finditer("(?s).+", text):',
            NEIGHBOURS,
        ),
        (
            "Python's white space in words with a lacking byte",
            "regex.finditer(self.encoding._pat_str, text):",
            're.finditer(r" ?[^\\W\\d_]+| ?\\d+| ?[^\\s\\w]+|\\s+(?!\\S)|\\s+", text):',
            NEIGHBOURS,
        ),
        (
            "digits not cut apart in a text with a lacking byte",
            "[i for piece in pieces for i in self._encode_known_bytes(piece)]",
            "[*self._encode_known_bytes(text)]",
            NEIGHBOURS,
        ),
        (
            "ranks taken for ids in a text with a lacking byte",
            "(self.ids[rank] for rank in self.encoding._encode_single_piece(known))",
            "self.encoding._encode_single_piece(known)",
            NEIGHBOURS,
        ),
        (
            "half a surrogate pair raises UnicodeEncodeError",
            'text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")',
            "text = str(text)",
            HALF,
        ),
        ("merges in one string not split", 'pair.split(" ") if isinstance(pair, str) else pair', "pair", MERGES),
        ("whole words are merged all the same", 'if model.get("ignore_merges"):', "if False:", WHOLE),
        ("whole words in all vocabularies", 'if model.get("ignore_merges"):', "if True:", WHOLE),
        # what ends and begins
        ("only the ending token of the settings", "if name in added] + eos\n", "if name in added]\n", ENDS),
        (
            "the end of a turn forgotten",
            'eos += [added[name] for name in ("<|im_end|>", "<|eot_id|>") if name in added]',
            "eos += []",
            ENDS,
        ),
        (
            "G14: one ending token of the list",
            "eos if isinstance(eos, list) else [eos]",
            "eos[:1] if isinstance(eos, list) else [eos]",
            ENDS,
        ),
        ("an ending token twice", "tuple(dict.fromkeys(eos))", "tuple(eos)", ENDS),
        (
            "the model's ending token ends documents",
            "if name in added] + eos\n",
            'if name in added][:0] + eos + [added[config_names["eos_token"]]]\n',
            ENDS,
        ),
        ("pad is always the ending token", 'added.get(config_names["pad_token"], eos[0])', "eos[0]", ENDS),
        (
            "tokens written out in the settings",
            'token["content"] if isinstance(token, dict) else token',
            "None if isinstance(token, dict) else token",
            SETTINGS,
        ),
        ("bos known and not put there", "[*([self.bos_id] if self.add_bos else []), *", "[*", BOS),
        ("bos never added", "add_bos=bos_id is not None and", "add_bos=False and", BOS),
        ("bos always added where there is one", "add_bos=bos_id is not None and", "add_bos=bos_id is not None or", BOS),
        (
            "post-processors in a sequence overlooked",
            '.get("processors", [post_processor or {}])',
            '.get("", [post_processor or {}])',
            BOS,
        ),
        # refused
        ("other models than BPE", 'if model.get("type", "BPE") != "BPE" or', "if", NOT),
        ("bytes as a last resort", 'or model.get("byte_fallback") or', "or", NOT),
        ("any normalizer", 'if normalizer not in (None, {"type": "NFC"}):', "if False:", NOT),
        (
            "a space put before texts",
            '[{"type": "ByteLevel", "add_prefix_space": False} as byte_level]',
            '[{"type": "ByteLevel"} as byte_level]',
            NOT,
        ),
        (
            "no pattern is GPT-2's",
            'as byte_level] if byte_level.get("use_regex", True):\n            return GPT2_PATTERN, False',
            "as byte_level]:\n            return GPT2_PATTERN, False",
            NOT,
        ),
        ("digits in groups", '{"type": "Digits", "individual_digits": True}', '{"type": "Digits"}', NOT),
        (
            "what the pattern finds is thrown away",
            '"behavior": "Isolated", "invert": False},\n              {"type"',
            '"invert": False},\n              {"type"',
            NOT,
        ),
        (
            "pattern turned round",
            '"behavior": "Isolated", "invert": False},\n              {"type"',
            '"behavior": "Isolated"},\n              {"type"',
            NOT,
        ),
        ("two patterns", '"add_prefix_space": False, "use_regex": False}]', '"add_prefix_space": False}]', NOT),
        ("tokens that swallow white space to the left", 'token.get("lstrip") or token', "token", NOT),
        ("tokens that swallow white space to the right", 'or token.get("rstrip") or', "or", NOT),
        ("tokens of white space alone", "or not name.strip()\n", "\n", NOT),
        (
            "a vocabulary of characters raises KeyError",
            "except (KeyError, ValueError, TypeError,",
            "except (TypeError,",
            NOT,
        ),
        ("a vocabulary that is a list raises AttributeError", "TypeError, AttributeError):", "TypeError):", NOT),
        ("merges that are numbers raise TypeError", "ValueError, TypeError, Attr", "ValueError, Attr", NOT),
        (
            "a merge without a token",
            "if missing := [token for token in ranks if len(token) > 1",
            "if missing := [token for token in ranks if len(token) > 99",
            NOT,
        ),
        ("no ending token raises IndexError", "    if not eos:\n", "    if False:\n", BROKEN),
        ("a missing file raises KeyError", "if not path.exists():", "if False:", BROKEN),
        (
            "broken files raise ValueError",
            "    except ValueError as error:  # that",
            "    except EOFError as error:  # that",
            BROKEN,
        ),
        (
            "files without an object raise AttributeError",
            "if not all(isinstance(read, dict) for read in (spec, settings, generation)):",
            "if not isinstance(spec, dict):",
            BROKEN,
        ),
        # saved
        (
            "names of bytes shifted",
            "chr(256 + i) for i, b in enumerate(others)",
            "chr(257 + i) for i, b in enumerate(others)",
            SAVE,
        ),
        ("soft hyphen printed", 'range(ord("¡"), ord("¬") + 1)', 'range(ord("¡"), ord("¬") + 2)', IDS),
        ("merges made of the wrong halves", "ranks.get(parts[i] + parts[i + 1], len(ranks))", "-i", SAVE),
        (
            "the saved file cuts another way",
            '"pattern": {"Regex": PATTERN}',
            '"pattern": {"Regex": GPT2_PATTERN}',
            SAVE,
        ),
        ("the saved ending token is another", '{"eos_token": "<|im_end|>"', '{"eos_token": "<|im_start|>"', SAVE),
        ("special tokens saved as words", '"special": True} for', '"special": False} for', SAVE),
        ("files not in UTF-8", '.write_text(text, encoding="utf-8")', '.write_text(text, encoding="latin-1")', SAVE),
        (
            "one file forgotten",
            "for name, text in tokenizer.files.items():",
            "for name, text in [*tokenizer.files.items()][1:]:",
            SAVE,
        ),
        ("an empty checkpoint", "    if not tokenizer.files:\n", "    if False:\n", UNSAVED),
        # special tokens and bytes
        (
            "injection: special tokens in any text",
            "        pieces = tuple(_cut_digits(text))",
            "        if any(name in text for name in self.special_tokens):\n"
            "            return self.encode_with(text, self.special_tokens)\n        pieces = tuple(_cut_digits(text))",
            SAYS,
        ),
        (
            "injection: names in a text are special",
            "        if not known:\n",
            "        known = known or [*self.special_tokens]\n        if not known:\n",
            NAMES,
        ),
        (
            "all names known are special",
            "sorted((name for name in names if name in self.special_tokens)",
            "sorted((name for name in self.special_tokens)",
            NAMES,
        ),
        ("the shortest name first", "key=len, reverse=True)", "key=len)", NAMES),
        ("names are regular expressions", '"|".join(map(re.escape, known))', '"|".join(known)', NAMES),
        (
            "a name without a token",
            "        if name not in self.special_tokens:\n            raise UserError",
            "        if name not in self.special_tokens:\n            return 0\n            raise UserError",
            NAMES,
        ),
        ("special tokens always skipped", 'b"" if skip_special else name.encode()', 'b""', NAMES),
        ("special tokens never skipped", 'b"" if skip_special else name.encode()', "name.encode()", NAMES),
        (
            "bytes decoded one by one",
            'return b"".join(names.get(i, self.token_bytes.get(i, b"")) for i in ids).decode("utf-8", '
            'errors="replace")',
            'return "".join(names.get(i, self.token_bytes.get(i, b"")).decode("utf-8", errors="replace") for i in ids)',
            BYTES,
        ),
        ("broken bytes dropped", 'errors="replace")\n\n\ndef _cut', 'errors="ignore")\n\n\ndef _cut', BYTES),
        (
            "an id without a token is a question mark",
            'self.token_bytes.get(i, b"")',
            'self.token_bytes.get(i, b"?")',
            BYTES,
        ),
        # our own
        (
            "vocabulary counted, not measured",
            "return max(*self.token_bytes, *self.special_tokens.values()) + 1",
            "return len(self.token_bytes) + len(self.special_tokens)",
            GAP,
        ),
        ("special tokens first", "name: len(ranks) + i for i, name", "name: i for i, name", GAP),
        ("another end", 'end = special["<|im_end|>"]', 'end = special["<|im_start|>"]', GAP),
        ("digits merged in training", 'in_python = r" ?\\d|', 'in_python = r" ?\\d+|', WRITE),
        ("underscores are letters in training", "[^\\W\\d_]+| ?(?:[^\\w\\s]|_)+", "[^\\W\\d]+| ?(?:[^\\w\\s])+", WRITE),
        (
            "tokens counted from 1",
            '{rank}\\n" for rank, token in enumerate(tokens))',
            '{rank}\\n" for rank, token in enumerate(tokens, 1))',
            WRITE,
        ),
        ("the old tokenizer after training", "    tiny.cache_clear()\n", "", WRITE),
        (
            "pairs counted once a word",
            "            pairs[pair] += weights[i]\n            places[pair].add(i)\n    merges",
            "            pairs[pair] += 1\n            places[pair].add(i)\n    merges",
            TRAIN,
        ),
        ("pairs that went stay counted", "pairs[pair] -= weights[i]", "pairs[pair] -= 0", TRAIN),
        (
            "new pairs not counted",
            "            for pair in zip(new, new[1:], strict=False):\n                pairs[pair] += weights[i]\n",
            "            for pair in zip(new, new[1:], strict=False):\n                pairs[pair] += 0\n",
            TRAIN,
        ),
        (
            "words with a new pair not found again",
            "                places[pair].add(i)\n            words[i] = new",
            "            words[i] = new",
            TRAIN,
        ),
        (
            "the last of equal pairs",
            "key=lambda pair: (pairs[pair], pair), default",
            "key=lambda pair: (pairs[pair], pair[::-1]), default",
            TRAIN,
        ),
        (
            "merged once a word",
            "        i += 2 if both else 1\n",
            "        i += 2 if both else 1\n        if both:\n            return merged + word[i:]\n",
            TRAIN,
        ),
        ("pairs overlap", "i += 2 if both else 1", "i += 1", TRAIN),
        ("merges that never occur", "if best is None or pairs[best] < 1:", "if best is None:", TRAIN),
        (
            "GPT-2 without a network fails with a traceback",
            "    except Exception as error:  # whatever",
            "    except EOFError as error:  # whatever",
            GPT2,
        ),
        ("GPT-2 without its ending token", '{"<|endoftext|>": end}', '{"<|endoftext|>": end - 1}', GPT2),
        (
            "the command does not know --model",
            "tokenizer = from_hf(args.model) if args.model else tiny()\n    ids",
            "tokenizer = tiny()\n    ids",
            CLI,
        ),
        ("bad input ends with code 1", "sys.exit(2)", "sys.exit(1)", CLI),
        (
            "a wrong flag prints the usage, too",
            'parser.exit(2, f"{parser.prog}: {message}\\n")',
            'parser.exit(2, f"{parser.format_usage()}{parser.prog}: {message}\\n")',
            CLI,
        ),
    ]
]
