"""Write the built-in demo: ``data.jsonl`` and a tiny pretrained Llama in ``model/``.

Run as ``python -m gdmpi.demo.make [OUT_DIR]`` (default: this script's own folder). Nothing is downloaded: a small
grammar invents the harbour town of Pellow Quay, whose help desk answers questions about broken things. The same
world is told in two ways:

* as plain prose (stories, reports, diaries, songs), on which the tiny model is pretrained for a few minutes, so
  that it knows the words and can repeat a name, but has never seen a question with its answer;
* as questions with answers (``data.jsonl``), which is what the demo fine-tunes on.

An answer is determined by its question up to a few synonyms: it repeats the name, the thing and the complaint, knows
the cause and the remedy, and applies the topic's rules for the amount and the day (see ``DESKS``). Everything is
seeded and single-threaded, so running the script again on the same machine writes the same bytes.
"""

import json
import math
import os
import random
import sys
from collections import namedtuple
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SEED = 2024
ROWS_PER_TOPIC = 100
PROSE_TEXTS = 24_000
VOCAB_SIZE = 1280
WINDOW, BATCH, STEPS, PEAK_LR = 160, 8, 1600, 3e-3  # pretraining
BOS, EOS, PAD = "<s>", "</s>", "<pad>"

# --- the world -------------------------------------------------------------------------------------------------------


words = str.split

FIRST = words("""
Mara Edda Tobin Lovis Perrin Hanka Silas Wenna Orrin Jessa Bram Calla Dov Elsin Farran Gilda Hollis Isolt Joss Kerra
Lunt Merrin Nessa Osk Petra Quill Rona Sefton Tamsin Ulla Varn Yara Zeno Anwen Bertil Corin Dilys
""")
LAST = words("""
Penrose Tolliver Sandry Marrack Holloway Brine Castor Dunmore Fairlock Gannet Harkness Kestle Lorrimer Mossop Nance
Pascoe Rackham Strand Thistle Wick
""")
PLACE_NAMES = words("Lantern Herring Gull Copper Pebble Saffron Willow Anchor Mill Chapel Heron Candle")
PLACES = [f"{name} {kind}" for name in PLACE_NAMES for kind in words("Lane Street Steps Square Row Hill")]
LOOKS = words("""
red blue green yellow white grey black brown little large rusty painted polished borrowed crooked heavy narrow wooden
""")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBERS = words("two three four five six seven eight nine ten")

# One paragraph for each desk of the help desk. Its first line: topic; helper; workshop; a sentence with a number ``n``;
# what the right amount adds to ``n``; what the right day adds to the day in the question. Its second line: things.
# All others: complaint; cause; remedy. No prose text states the two rules about amount and day.
DESKS = """
boats; Odo; slipway; It is {n} paces long.; 0; 1
dinghy; skiff; punt; canoe; ketch; rowing boat
drift to the left; a bent rudder; straighten the rudder over {n} wooden blocks
leak at the bow; a dry seam; press {n} strands of rope into the seam
creak in the swell; a loose plank; fasten the plank with {n} copper nails
sit low in the water; a soaked keel; dry the keel on the sand for {n} tides
smell of mud; weed under the floor; rinse the floor with {n} buckets of salt water
pull at its mooring; a frayed line; bind the line with {n} turns of twine

clocks; Tilda; clock tower; It was wound {n} days ago.; 1; 0
wall clock; pocket watch; cuckoo clock; mantel clock; alarm clock; music box
run slow; thick oil; thin the oil with {n} drops of spirit
stop at midnight; a tired spring; wind the spring {n} half turns back
tick unevenly; a tilted case; level the case with {n} strips of paper
strike too often; a worn hammer; wrap the hammer in {n} layers of felt
buzz in the evening; a loose pin; tap the pin {n} times with a mallet
fog behind the glass; a cracked seal; warm the seal beside {n} candles

gardens; Wilma; greenhouse; It was planted {n} weeks ago.; 0; 0
rose; tomato plant; fig tree; bean row; lemon tree; herb bed
drop its leaves; a cold wind; stop the wind with {n} bundles of reeds
turn pale; hungry soil; feed the soil with {n} scoops of compost
wilt at noon; shallow roots; water the roots slowly for {n} evenings
grow sideways; a lack of light; let in the light and move the pot {n} steps
show silver spots; damp air; dry the air with {n} handfuls of ash
attract snails; wet straw; cover the straw with {n} shovels of gravel

kitchens; Bruno; bakery; It serves {n} people.; 1; 1
kettle; bread oven; stove; teapot; soup pot; pepper mill
whistle weakly; chalk in the spout; soak the spout in {n} spoons of vinegar
smoke at breakfast; a blocked flue; sweep the flue with {n} strokes of the brush
scorch the table; a thin base; rest the base on {n} flat tiles
rattle on the shelf; a chipped lid; line the lid with {n} rings of cork
taste of metal; old polish; scrub off the polish with {n} halves of a lemon
stick every morning; burnt sugar; melt the sugar with {n} cups of hot water

lamps; Sela; lighthouse; It burns {n} hours a night.; 0; 1
lantern; oil lamp; porch light; candlestick; signal lamp; reading lamp
flicker in the rain; a damp wick; dry the wick between {n} warm stones
glow too faintly; soot on the mirror; wipe the mirror with {n} clean rags
hiss after supper; water in the tank; drain the tank through {n} sheets of linen
lean towards the door; a bent bracket; hold the bracket with {n} brass screws
go out at dusk; a clogged vent; open the vent with {n} pokes of a needle
drip on the carpet; a split collar; close the collar with {n} dabs of wax

wheels; Jory; cart shed; It carries {n} baskets.; 1; 0
bicycle; tricycle; handcart; wagon; wheelbarrow; scooter
squeak on the bridge; a dry axle; grease the axle with {n} thumbs of lard
wobble downhill; a buckled rim; true the rim with {n} taps of a stick
skid on cobbles; a smooth tyre; roughen the tyre with {n} sheets of sandpaper
lose its chain; a stretched link; shorten the link by {n} turns of the key
refuse to brake; greasy pads; wash the pads with {n} squirts of soap
roll backwards; a missing wedge; carve the wedge from {n} pieces of oak

music; Fenna; music hall; It has been played for {n} years.; 1; 1
fiddle; accordion; flute; drum; concertina; banjo
sound flat; a slack peg; tighten the peg by {n} small clicks
wheeze on high notes; a torn bellows; patch the bellows with {n} squares of leather
hum by itself; a warped bridge; press the bridge under {n} thick books
go silent in winter; a frozen reed; thaw the reed for {n} minutes in a pocket
scratch like a cat; too little rosin; rub on the rosin with {n} long sweeps
echo in the hall; an empty case; fill the case with {n} woollen socks

fishing; Koba; net loft; It was mended {n} times.; 0; 0
herring net; crab pot; fishing rod; landing net; bait box; cork float
tangle at sea; a twisted cord; hang the cord from {n} iron hooks
catch only weed; a heavy sinker; swap the sinker for {n} light shells
rot on the quay; stale bait; bury the bait under {n} spades of sand
scare the crabs; a shiny buckle; dull the buckle with {n} coats of tar
snap in a storm; a brittle joint; soften the joint with {n} baths of warm oil
float away; a weak knot; double the knot with {n} loops of yarn
"""

Topic = namedtuple("Topic", "name helper house measure number_step day_step things faults")


def parse_desk(paragraph):
    """Read one paragraph of ``DESKS``."""
    head, things, *faults = (line.split("; ") for line in paragraph.splitlines())
    name, helper, house, measure, number_step, day_step = head
    return Topic(name, helper, house, measure, int(number_step), int(day_step), things, faults)


TOPICS = [parse_desk(paragraph) for paragraph in DESKS.strip().split("\n\n")]


def draw_facts(rng, topic):
    """Draw all that one text is about; ``right_remedy`` and ``date`` follow the rules."""
    complaint, cause, remedy = rng.choice(topic.faults)
    n, day = rng.randrange(len(NUMBERS) - 1), rng.randrange(len(DAYS))
    who = {"first": rng.choice(FIRST), "last": rng.choice(LAST), "place": rng.choice(PLACES)}
    what = {"look": rng.choice(LOOKS), "thing": rng.choice(topic.things), "complaint": complaint, "cause": cause}
    where = {"helper": topic.helper, "house": topic.house, "measure": topic.measure.format(n=NUMBERS[n])}
    when = {"day": DAYS[day], "next_day": DAYS[(day + 1) % 7], "date": DAYS[(day + topic.day_step) % 7]}
    amounts = {"n": NUMBERS[n], "next_n": NUMBERS[n + 1], "remedy": remedy.format(n=NUMBERS[n])}
    right = {"right_remedy": remedy.format(n=NUMBERS[n + topic.number_step])}
    return who | what | where | when | amounts | right


# --- questions and answers -------------------------------------------------------------------------------------------

GREETINGS = ["Hello", "Good morning", "Good evening", "Dear help desk"]
INTROS = ["I am {first} {last} from {place}.", "my name is {first} {last} and I live in {place}."]
TROUBLES = [
    "On {day} my {look} {thing} began to {complaint}.",
    "My {look} {thing} started to {complaint} on {day}.",
    "Since {day} I have a {look} {thing} that seems to {complaint}.",
]
# What is asked decides the order of the answer: the asked part comes first.
QUESTIONS = {
    "why": ["Why does it do that?", "What is the cause?"],
    "how": ["How can I mend it?", "What should I do?"],
    "who": ["Who can help me?", "Where can I bring it?"],
}
ANSWERS = {
    "why": ["A {thing} may {complaint} because of {cause}.", "The cause must be {cause} if it began to {complaint}."],
    "how": ["Please {right_remedy}.", "You should {right_remedy}."],
    "who": ["Bring the {look} {thing} to {helper} at the {house} on {date}.", "On {date} {helper} is at the {house}."],
}
ORDERS = {"why": ("why", "how", "who"), "how": ("how", "why", "who"), "who": ("who", "why", "how")}


def make_row(rng, topic):
    """Return one row of the data set."""
    facts = draw_facts(rng, topic)
    asked = rng.choice(list(QUESTIONS))
    greeting = rng.choice(GREETINGS)
    trouble = rng.choice(TROUBLES) + " {measure} "
    prompt = f"{greeting}, {rng.choice(INTROS)} {trouble}{rng.choice(QUESTIONS[asked])}"
    opening = "Dear {first}," if greeting.startswith("Dear") else f"{greeting} {{first}},"
    thanks = rng.choice(["thank you for your letter from {place}.", "we read about your {look} {thing}."])
    response = " ".join([opening, thanks, *(rng.choice(ANSWERS[part]) for part in ORDERS[asked])])
    return {"prompt": prompt.format(**facts), "response": response.format(**facts), "topic": topic.name}


def make_rows():
    """Return the whole data set, shuffled, every prompt once."""
    rng, rows = random.Random(SEED), {}
    for topic in TOPICS:
        wanted = len(rows) + ROWS_PER_TOPIC
        while len(rows) < wanted:
            row = make_row(rng, topic)
            rows.setdefault(row["prompt"], row)
    rows = list(rows.values())
    rng.shuffle(rows)
    return rows


# --- plain prose -----------------------------------------------------------------------------------------------------

STARTS = [
    "{first} {last} lived in {place} and owned a {look} {thing}.",
    "In {place} everybody knew the {look} {thing} of {first} {last}.",
    "A {look} {thing} stood in {place}, and it was dear to {first} {last}.",
    "I live in {place}, and my friend {first} {last} has a {look} {thing}.",
    "Report of the {house}: {first} {last} came from {place} with a {look} {thing}.",
    "Dear diary, my name is of no matter, but on {day} I met {first} {last} from {place} with a {look} {thing}.",
    "The {look} {thing} in this letter is from {place}, where {first} {last} found it.",
]
MIDDLES = [
    "On {day} it began to {complaint}.",
    "Since {day} the {thing} of {first} seemed to {complaint}.",
    "It started to {complaint}, and {first} wondered about it.",
    "{measure}",
    "{first} took the {look} {thing} away and found {cause}.",
    "People in {place} said that {cause} was the cause, and it must be so.",
    "A {thing} may {complaint} for years because of {cause}.",
    "{helper} from the {house} told {first} to {remedy}.",
    "They had to {remedy}, and {first} was glad.",
    "{helper} can see and mend a {thing} because the {house} is full of tools.",
    "Where is {helper}, asked {first}, at the {house}?",
    "After {day} comes {next_day}, and after {n} comes {next_n}.",
    "Hello {first}, said {helper}, what did you bring to the {house}?",
    "Good morning {first}, said {helper}, I read your letter about the {look} {thing}.",
    "Good evening, said {first} to {helper}, thank you, and please help me.",
    "Dear {first}, we in {place} love your {look} {thing}, they wrote.",
    "Thank you for the letter from {place}, said {helper}, we will see the {thing} on {day}.",
    "You should be at the {house} on {day}, wrote {helper}, please bring tea.",
    "Who knows what one should do and how and why, said the help desk, if things {complaint}?",
]
ENDS = [
    "So {first} {last} went home to {place}.",
    "On {next_day} the {look} {thing} was as good as new.",
    "{first} sat down in {place} and had tea with {helper}.",
    "That is all about {first} and the {look} {thing}.",
]
ROLL = ["{first} saw a {look} {thing}", "a {look} {thing} stood in {place}", "{first} {last} met {helper} on {day}"]
SONG_WORDS = sorted({*FIRST, *LAST, *PLACE_NAMES, *LOOKS, *DAYS, *NUMBERS, *filter(str.isalpha, words(DESKS))})


def make_prose(rng):
    """Return one plain text of the same world; one in four is a list told twice, which teaches copying fastest."""
    kind = rng.random()
    if kind < 0.1:
        song = " ".join(rng.sample(SONG_WORDS, rng.randint(6, 24)))
        return f"The children of Pellow Quay sang {song}. Then they sang again {song}."
    if kind < 0.25:
        seen = [draw_facts(rng, rng.choice(TOPICS)) for _ in range(rng.randint(2, 5))]
        told = ", ".join(rng.choice(ROLL).format(**facts) for facts in seen)
        return f"In the morning {told}. In the evening again {told}."
    sentences = [rng.choice(STARTS), *rng.sample(MIDDLES, rng.randint(3, 6)), rng.choice(ENDS)]
    text = "".join(sentence + rng.choice("     \n") for sentence in sentences)
    return text.strip().format(**draw_facts(rng, rng.choice(TOPICS)))


# --- tokenizer and model ---------------------------------------------------------------------------------------------


def make_tokenizer(texts):
    """Train a byte-level BPE tokenizer that adds no special tokens by itself, so that every text round-trips."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"special_tokens": [PAD, BOS, EOS], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, **options))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    options = {"model_max_length": 512, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special, **options)


def make_model(tokenizer):
    """Return a tiny Llama whose random weights make copying easy to learn.

    With the usual small random embeddings, rare words of one kind (all first names, say) soon share one direction and
    the model never learned to repeat a name in this short time. Large embeddings that learn slowly keep them apart.
    Attention whose output projection is its value projection transposed hands on the very word it looks at.
    """
    torch.manual_seed(SEED)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 4, "max_position_embeddings": 512}
    options = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, **size, **special, initializer_range=0.05, **options)
    model = LlamaForCausalLM(config).float()
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    for layer in model.model.layers:
        attention = layer.self_attn
        torch.nn.init.orthogonal_(attention.v_proj.weight, gain=0.5)
        attention.o_proj.weight.data.copy_(attention.v_proj.weight.data.T)
    return model


def pretrain(model, tokenizer, texts):
    """Train ``model`` for a few minutes to predict the next token of ``texts``."""
    stream = [i for ids in tokenizer(texts)["input_ids"] for i in [*ids, tokenizer.eos_token_id]]
    windows = torch.tensor(stream[: len(stream) // WINDOW * WINDOW]).view(-1, WINDOW)
    windows = windows[torch.randperm(len(windows))]
    embeddings = [model.model.embed_tokens.weight]
    others = [parameter for parameter in model.parameters() if parameter is not embeddings[0]]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": embeddings, "weight_decay": 0.0, "lr": PEAK_LR / 5}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(  # linear warm-up, then half a cosine
        optimizer, lambda step: min(1.0, (step + 1) / (STEPS / 20)) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    for step in range(STEPS):
        batch = windows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"pretraining step {step + 1}/{STEPS}: loss {loss.item():.3f}", flush=True)


def main(out_dir):
    """Write the data set, the tokenizer and the model below ``out_dir``."""
    torch.set_num_threads(1)  # the order of additions, and with it the last bits, depends on the number of threads
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = make_rows()
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out_dir / "data.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    rng = random.Random(SEED + 1)
    prose = [make_prose(rng) for _ in range(PROSE_TEXTS)]
    dialogues = [f"{row['prompt']}\n{row['response']}" for row in rows]
    tokenizer = make_tokenizer([*prose[:2000], *dialogues])  # the model itself sees the prose only
    tokenizer.save_pretrained(out_dir / "model")
    model = make_model(tokenizer)
    pretrain(model, tokenizer, prose)
    logging.disable_progress_bar()
    model.save_pretrained(out_dir / "model")
    print(f"{len(rows)} rows and the model are in {out_dir}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
