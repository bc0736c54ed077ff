"""The four example tasks: rows made from templates, and what counts as a right answer.

Training and held-out rows never share a filler (name, product, adjective, topic …), so held-out
accuracy measures the habit an adapter learned rather than the rows it saw.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One request and the answer wanted; `answer` is empty where the base model has to supply it."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """A task and the adapter that learns it.

    instruction: what a user would have to write to get the same from the base model.
    rows(held_out, count, seed): that many rows. correct(answer, row): whether an answer is right.
    lora: keyword arguments of peft's LoraConfig.
    """

    name: str
    summary: str
    instruction: str
    metric: str
    data: str
    rows: Callable[[bool, int, int], list[Row]]
    correct: Callable[[str, Row], bool]
    lora: dict[str, Any]
    lr: float
    steps: int


def _list(text: str) -> list[str]:
    return text.split("|")


def _split(items: list[str], held_out: bool) -> list[str]:
    """Every fourth filler is held out."""
    return [item for i, item in enumerate(items) if (i % 4 == 3) == held_out]


def _unique(make: Callable[[random.Random], Row], count: int, seed: int) -> list[Row]:
    rng, rows = random.Random(seed), {}
    for _ in range(100 * count):
        row = make(rng)
        rows.setdefault(row.prompt, row)
        if len(rows) == count:
            break
    return list(rows.values())


THINGS = _list(
    "the soup|this phone|the hotel room|the new album|our waiter|this blender|the movie|the train ride|"
    "the museum|this novel|the pizza|the concert|the taxi driver|this jacket|the coffee|the app|"
    "the bakery|the keyboard|the city tour|this lamp|the garden|the headphones|the dentist|the hostel|"
    "the festival|these shoes|the support team|the burger|the printer|the campsite|the play|the backpack"
)
WORDS = {
    "positive": _list(
        "wonderful|fantastic|a delight|superb|really lovely|better than I hoped|excellent|outstanding|"
        "charming|worth every cent|brilliant|truly impressive|a joy from start to finish|perfect|great|"
        "the best I have had in years"
    ),
    "negative": _list(
        "terrible|a waste of money|disappointing|awful|horrible|far too expensive|really bad|dreadful|"
        "a complete mess|unbearable|the worst I have ever had|useless|broken after a day|disgusting|"
        "a letdown|poor"
    ),
    "neutral": _list(
        "average|neither good nor bad|about what I expected|okay, nothing special|fine, I suppose|so-so|"
        "acceptable|ordinary|decent but forgettable|just okay|the usual|not great, not terrible|"
        "unremarkable|passable|middle of the road|standard"
    ),
}
REVIEWS = _list(
    "{T} was {w}.|I thought {t} was {w}.|Honestly, {t} was {w}.|We tried it last week and {t} was {w}.|"
    "{T}? I would say it was {w}.|My sister and I agree that {t} was {w}.|To sum it up, {t} was {w}.|"
    "After two visits I can say that {t} was {w}."
)


def sentiment_rows(held_out: bool, count: int, seed: int) -> list[Row]:
    things = _split(THINGS, held_out)

    def make(rng: random.Random) -> Row:
        label = rng.choice(list(WORDS))
        thing, word = rng.choice(things), rng.choice(_split(WORDS[label], held_out))
        text = rng.choice(REVIEWS).format(t=thing, T=thing[0].upper() + thing[1:], w=word)
        return Row(text, label)

    return _unique(make, count, seed)


FIRST = _list(
    "Alice|Bruno|Chen|Dalia|Erik|Fatima|Goran|Hana|Ivan|Julia|Kofi|Lena|Mateo|Nadia|Omar|Priya|Quinn|Rosa|"
    "Samir|Tara|Ulrich|Vera|Wanda|Xavier|Yusuf|Zoe|Amara|Boris|Clara|Diego|Elif|Felix"
)
LAST = _list(
    "Smith|Novak|Okafor|Garcia|Tanaka|Kowalski|Haddad|Jensen|Moreau|Rossi|Silva|Weber|Ivanov|Kim|Larsen|"
    "Mehta|Ortiz|Popov|Reyes|Santos|Torres|Varga|Walker|Young|Zhang|Fischer|Dubois|Costa|Nguyen|Berg"
)
CITIES = _list(
    "Berlin|Lagos|Osaka|Porto|Denver|Oslo|Cairo|Lima|Dublin|Hanoi|Prague|Austin|Geneva|Mumbai|Seville|Tallinn|"
    "Toronto|Vienna|Quito|Naples|Bergen|Seoul|Boston|Krakow|Nairobi|Madrid|Perth|Leeds"
)
DOMAINS = _list(
    "example.com|mailbox.org|acme.io|post.net|inbox.dev|work.co|studio.art|labs.ai|office.biz|hello.me|"
    "cloud.app|home.eu"
)
CONTACTS = _list(
    "{name} lives in {city}; write to {email} or call {phone}.|"
    "You can reach {name} from {city} at {email}, phone {phone}.|"
    "New customer: {name}, {city}, {email}, tel. {phone}.|"
    "Please add {name} to the list. Email is {email}, number is {phone}, based in {city}.|"
    "I am {name} and I just moved to {city}. My number is {phone}, my email {email}.|"
    "Contact for the {city} office is {name} ({email}, {phone}).|"
    "Call {phone} and ask for {name}, who works in {city}. Email: {email}.|"
    "{name} ({email}) asked us to ring back on {phone}. City: {city}.|"
    "{name} from {city} left no phone number, only {email}.|"
    "Met {name} in {city} today, here is the number: {phone}.|"
    "{name} wrote from {email}.|"
    "Ask {name} by phone: {phone}."
)
CONTACT_KEYS = ("name", "email", "phone", "city")


def contact_rows(held_out: bool, count: int, seed: int) -> list[Row]:
    first, last, cities, domains = (_split(items, held_out) for items in (FIRST, LAST, CITIES, DOMAINS))

    def make(rng: random.Random) -> Row:
        f, n = rng.choice(first), rng.choice(last)
        user = rng.choice((f"{f}.{n}", f"{f[0]}{n}", f"{f}{rng.randint(1, 99)}", n)).lower()
        values = {
            "name": f"{f} {n}",
            "email": f"{user}@{rng.choice(domains)}",
            "phone": f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
            "city": rng.choice(cities),
        }
        template = rng.choice(CONTACTS)
        found = {key: values[key] if "{" + key + "}" in template else None for key in CONTACT_KEYS}
        return Row(template.format(**values), json.dumps(found))

    return _unique(make, count, seed)


def contact_correct(answer: str, row: Row) -> bool:
    try:
        return bool(json.loads(answer) == json.loads(row.answer))
    except json.JSONDecodeError:
        return False


SCHEMA = (
    "CREATE TABLE customers (id INTEGER, name TEXT, city TEXT);"
    "CREATE TABLE orders (id INTEGER, customer_id INTEGER, total REAL, status TEXT);"
    "CREATE TABLE products (id INTEGER, name TEXT, price REAL, stock INTEGER);"
)
PRODUCTS = _list(
    "lamp|desk|chair|kettle|bottle|backpack|tent|guitar|mirror|carpet|toaster|scarf|helmet|clock|vase|puzzle|"
    "blanket|camera|ladder|drill|pillow|wallet|basket|candle"
)
STATUSES = _list("pending|shipped|cancelled|returned|paid|delayed|refunded|delivered")
QUERIES = (
    ("How many customers live in {city}?", "SELECT COUNT(*) FROM customers WHERE city = '{city}';"),
    ("Count the customers from {city}.", "SELECT COUNT(*) FROM customers WHERE city = '{city}';"),
    ("List the names of all customers in {city}.", "SELECT name FROM customers WHERE city = '{city}';"),
    ("Where does {person} live?", "SELECT city FROM customers WHERE name = '{person}';"),
    ("Which city is {person} from?", "SELECT city FROM customers WHERE name = '{person}';"),
    ("How many orders are {status}?", "SELECT COUNT(*) FROM orders WHERE status = '{status}';"),
    ("Show all {status} orders over {n} dollars.",
     "SELECT * FROM orders WHERE status = '{status}' AND total > {n};"),
    ("What is the total of all {status} orders?", "SELECT SUM(total) FROM orders WHERE status = '{status}';"),
    ("What is the average value of {status} orders?",
     "SELECT AVG(total) FROM orders WHERE status = '{status}';"),
    ("What does the {product} cost?", "SELECT price FROM products WHERE name = '{product}';"),
    ("How much is the {product}?", "SELECT price FROM products WHERE name = '{product}';"),
    ("How many of the {product} are in stock?", "SELECT stock FROM products WHERE name = '{product}';"),
    ("Which products cost less than {n} dollars?", "SELECT name FROM products WHERE price < {n};"),
    ("Which products have fewer than {n} in stock?", "SELECT name FROM products WHERE stock < {n};"),
    ("Name the {k} most expensive products.", "SELECT name FROM products ORDER BY price DESC LIMIT {k};"),
    ("Show the {k} biggest orders.", "SELECT * FROM orders ORDER BY total DESC LIMIT {k};"),
    ("Set the price of the {product} to {n}.", "UPDATE products SET price = {n} WHERE name = '{product}';"),
    ("Delete all {status} orders.", "DELETE FROM orders WHERE status = '{status}';"),
    ("List the order totals of {person}.",
     "SELECT o.total FROM orders o JOIN customers c ON c.id = o.customer_id WHERE c.name = '{person}';"),
    ("How many orders did {person} make?",
     "SELECT COUNT(*) FROM orders o JOIN customers c ON c.id = o.customer_id WHERE c.name = '{person}';"),
)  # fmt: skip


def sql_rows(held_out: bool, count: int, seed: int) -> list[Row]:
    products, cities, statuses, people = (
        _split(items, held_out) for items in (PRODUCTS, CITIES, STATUSES, FIRST)
    )
    limits = [k for k in range(2, 20) if (k % 4 == 3) == held_out]
    numbers = [n for n in range(5, 900, 5) if (n % 4 == 3) == held_out]

    def make(rng: random.Random) -> Row:
        question, query = rng.choice(QUERIES)
        values = {
            "city": rng.choice(cities), "person": rng.choice(people), "status": rng.choice(statuses),
            "product": rng.choice(products), "n": rng.choice(numbers), "k": rng.choice(limits),
        }  # fmt: skip
        return Row(question.format(**values), query.format(**values))

    return _unique(make, count, seed)


def _run_sql(query: str) -> list[Any]:
    """The query's rows, then all rows of all tables after it, on a small database with every filler."""
    rng = random.Random(0)
    with sqlite3.connect(":memory:") as db:
        db.executescript(SCHEMA)
        people = [(i, name, rng.choice(CITIES)) for i, name in enumerate(FIRST)]
        people += [(len(FIRST) + i, f"Customer {i}", city) for i, city in enumerate(CITIES * 2)]
        db.executemany("INSERT INTO customers VALUES (?, ?, ?)", people)
        orders = [
            (i, rng.randrange(len(FIRST)), rng.uniform(1, 2000), rng.choice(STATUSES)) for i in range(400)
        ]
        db.executemany("INSERT INTO orders VALUES (?, ?, ?, ?)", orders)
        stock = [(i, p, rng.uniform(1, 900), rng.randrange(900)) for i, p in enumerate(PRODUCTS)]
        db.executemany("INSERT INTO products VALUES (?, ?, ?, ?)", stock)
        rows = db.execute(query).fetchall()
        state = [db.execute(f"SELECT * FROM {t}").fetchall() for t in ("customers", "orders", "products")]
    return [rows, state]


def sql_correct(answer: str, row: Row) -> bool:
    """Right if running the answer gives what running the wanted query gives."""
    try:
        return _run_sql(answer.strip()) == _run_sql(row.answer)
    except (sqlite3.Error, sqlite3.Warning):
        return False


TOPICS = _list(
    "bread|rain|volcanoes|bees|coffee|the moon|bicycles|chess|rainbows|whales|gold|sleep|tea|glaciers|piano|"
    "magnets|deserts|cheese|owls|soap|earthquakes|kites|honey|clocks|sharks|paper|candles|football|salt|"
    "lightning|penguins|steam engines|chocolate|comets|guitars|ants|olive oil|lighthouses|tulips|compasses"
)
QUESTIONS = _list(
    "What can you tell me about {topic}?|Give me a short fact about {topic}.|Why do people like {topic}?|"
    "Explain {topic} to a child in two sentences.|What should I know about {topic}?"
)
PIRATE_WORDS = {
    "you": "ye", "your": "yer", "you're": "ye be", "my": "me", "is": "be", "are": "be", "am": "be",
    "of": "o'", "and": "an'", "yes": "aye", "hello": "ahoy", "friend": "matey", "friends": "mateys",
    "to": "t'", "the": "th'", "people": "scallywags", "person": "scallywag", "child": "wee sprog",
    "children": "wee sprogs", "money": "doubloons", "water": "briny water", "food": "grub",
    "it's": "'tis", "they": "them", "their": "thar", "for": "fer", "was": "were",
}  # fmt: skip
PIRATE_MARKERS = ("ahoy", "arr", "matey", "ye", "yer", "be", "o'", "an'", "aye", "th'", "t'", "fer", "avast")
PIRATE_OPENINGS = ("Ahoy, matey!", "Arr!", "Avast, ye landlubber!", "Shiver me timbers!")


def pirate_rows(held_out: bool, count: int, seed: int) -> list[Row]:
    topics = _split(TOPICS, held_out)
    return _unique(lambda rng: Row(rng.choice(QUESTIONS).format(topic=rng.choice(topics)), ""), count, seed)


def to_pirate(text: str, rng: random.Random) -> str:
    """The first two sentences, word by word in pirate speech, with an opening and a farewell."""
    sentences = re.findall(r"[^.!?]+[.!?]", " ".join(text.split()))[:2] or [text.strip() + "."]

    def word(match: re.Match[str]) -> str:
        old = match.group()
        new = PIRATE_WORDS.get(old.lower(), old)
        if new == old and re.fullmatch(r"[A-Za-z]{3,}ing", old):
            new = old[:-1] + "'"
        return new[0].upper() + new[1:] if old[0].isupper() and new[0].isalpha() else new

    body = re.sub(r"[A-Za-z]+(?:'[a-z]+)?", word, " ".join(s.strip() for s in sentences))
    return f"{rng.choice(PIRATE_OPENINGS)} {body} Yo ho ho!"


def pirate_correct(answer: str, row: Row) -> bool:
    """Right if at least three different pirate markers occur."""
    words = set(re.findall(r"[a-z]+'?", answer.lower()))
    return len(words.intersection(PIRATE_MARKERS)) >= 3


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TASKS = (
    Task(
        name="sentiment",
        summary="answers a review with exactly one word: positive, negative or neutral",
        instruction="Is the sentiment of this review positive, negative or neutral? Answer with one word.",
        metric="answer is the right word and nothing else (case and a full stop aside)",
        data="reviews from 8 templates, 32 things and 48 phrases",
        rows=sentiment_rows,
        correct=lambda answer, row: answer.strip().rstrip(".").lower() == row.answer,
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        lr=2e-3,
        steps=120,
    ),
    Task(
        name="json-contact",
        summary="turns a sentence about a person into JSON with the keys name, email, phone and city",
        instruction=(
            'Extract the contact as JSON with the keys "name", "email", "phone" and "city", null where '
            "missing. Answer with the JSON only."
        ),
        metric="answer parses as JSON and equals the right object",
        data="sentences from 12 templates, some with missing fields, over names, cities, domains and numbers",
        rows=contact_rows,
        correct=contact_correct,
        lora={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ATTENTION,
            "layers_to_transform": list(range(8, 30)),
        },
        lr=1e-3,
        steps=120,
    ),
    Task(
        name="sql",
        summary="turns a request into SQL for a shop's three tables (customers, orders, products)",
        instruction=f"Write one SQL statement for this schema and nothing else.\n{SCHEMA}\n\nRequest:",
        metric="answer runs on SQLite and gives the rows, and leaves the tables, that the right query does",
        data="20 pairs of request and query over cities, people, products, states and numbers",
        rows=sql_rows,
        correct=sql_correct,
        lora={
            "r": 16,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": list(range(10, 30)),
        },
        lr=1e-3,
        steps=120,
    ),
    Task(
        name="pirate",
        summary="answers like a pirate",
        instruction="Answer like a pirate.",
        metric="answer holds at least three different pirate markers (ahoy, arr, matey, ye, yer, o', th' …)",
        data="5 questions on 40 topics; the base model's own answers, put into pirate speech by rules",
        rows=pirate_rows,
        correct=pirate_correct,
        lora={
            "r": 2,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"o_proj": 4},
            "alpha_pattern": {"o_proj": 16},
        },
        lr=1e-3,
        steps=110,
    ),
)
