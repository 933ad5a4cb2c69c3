// The form's settings as a YAML file and as a command.

const quote = (value) => (/^[\w./,:=-]+$/.test(value) ? value : `'${value.replaceAll("'", "'\\''")}'`);
const plain = (value) => (Array.isArray(value) ? value.join(",") : String(value));

/** The inputs that name the datasets: as in a folder that holds all of them, if they are several. */
function inputs({ settings, datasets }) {
  if (datasets.length === 1) {
    const [{ name, token }] = datasets, { controls, ...others } = settings, dataset = `datasets/${name}`;
    const folders = (Array.isArray(controls) ? controls : String(controls ?? "").split(",")).map((each) => each.trim()).filter(Boolean);
    return { dataset, ...(folders.length ? { controls: folders.map((each) => `${dataset}/${each}`) } : {}), ...(token ? { placeholder_token: token } : {}), ...others };
  }
  return { dataset: "datasets", subjects: datasets.map((each) => `${each.token}=${each.name}`), ...settings };
}

const hint = ({ datasets }) => (datasets.length > 1 ? `# "datasets" is a folder with nothing but ${datasets.map((each) => each.name).join(" and ")} in it.\n` : "");

export function asYaml(given) {
  return hint(given) + Object.entries(inputs(given)).map(([name, value]) => `${name}: ${JSON.stringify(value)}`).join("\n");
}

export function asCommand(given) {
  const option = ([name, value]) => {
    const words = name.replaceAll("_", "-");
    return typeof value === "boolean" ? `  --${value ? "" : "no-"}${words}` : `  --${words} ${quote(plain(value))}`;
  };
  return hint(given) + ["zeroprior train", ...Object.entries(inputs(given)).map(option)].join(" \\\n");
}
